"""Hypothesis for these tests: import `given` from here. A busy machine is no reason to fail."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings

__all__ = ["given", "settings"]

settings.register_profile(
    "busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("busy machine")
