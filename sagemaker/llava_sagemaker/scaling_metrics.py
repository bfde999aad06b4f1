"""What instances tell CloudWatch and autoscaling asks it for: names that both must agree on."""

from __future__ import annotations

NAMESPACE = "LlavaTriton"
ENDPOINT = "EndpointName"
"""The only dimension, so that an average is one over the endpoint's instances."""
OPEN_SESSIONS = "OpenSessions"
ACTIVE_SESSIONS = "ActiveSessions"
GPU_MEMORY_USED = "GpuMemoryUsed"
"""Percent of the engine's blocks that sessions hold."""
