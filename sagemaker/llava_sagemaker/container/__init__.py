"""The container's entry point: Triton and the session adapter, watched from start to end."""
