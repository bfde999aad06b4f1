"""Which kernels a piece of work spends its time in, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MOST = 20
"""Kernels that are told; the rest is added up."""


def kernel_times(run: Callable[[], Any], device: torch.device) -> list[dict[str, Any]]:
    """Do some work, and say where the device's time went.

    Args:
        run: returns when the device is done.
        device: where it computes; of a CPU, operations are told instead of kernels.

    Returns:
        `name`, `calls` and `us` (microseconds) of each kernel, the longest first.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as seen:
        run()
    field = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    told = [
        {"name": event.key, "calls": event.count, "us": float(getattr(event, field))}
        for event in seen.key_averages()
        if getattr(event, field) > 0
    ]
    told.sort(key=lambda each: -each["us"])
    rest = told[MOST:]
    if rest:
        calls, took = sum(each["calls"] for each in rest), sum(each["us"] for each in rest)
        told[MOST:] = [{"name": "all others", "calls": calls, "us": took}]
    return told


def kernel_table(times: list[dict[str, Any]], steps: int) -> str:
    """The same for people.

    Args:
        times: from `kernel_times`.
        steps: that were done: times and calls are told of one.
    """
    whole = sum(each["us"] for each in times) or 1.0
    lines = [
        f"  {each['us'] / steps:10.1f} us {100 * each['us'] / whole:5.1f} % "
        f"{each['calls'] / steps:7.1f} calls  {each['name'][:90]}"
        for each in times
    ]
    return "\n".join(lines)
