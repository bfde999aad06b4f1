"""The session adapter, the container, the local endpoint, the deployment."""
