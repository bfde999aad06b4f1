"""What only a GPU does, as far as it can be seen without one."""

from __future__ import annotations

import gc
import sys
import weakref
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from llava_triton import device as device_module
from llava_triton.device import (
    DeviceTimer,
    bytes_on_host,
    compute_dtype,
    cuda_graph,
    graph_pool,
    is_lost,
    keep_for_current_stream,
    leave_cores,
    switch_threads_quickly,
    wait_for,
)


def test_what_a_graph_reads_lives_as_long_as_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph knows addresses alone: memory that is given away meanwhile would be read by it."""
    monkeypatch.setattr(device_module, "_warming_stream", lambda _: mock.Mock())
    for name, stub in {
        "current_stream": mock.Mock(),
        "stream": lambda _: nullcontext(),
        "CUDAGraph": mock.Mock,
        "graph": lambda graph, pool: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)

    def record() -> tuple[Any, weakref.ref[Tensor]]:
        starts = torch.arange(3)
        return cuda_graph(lambda: starts + 1, torch.device("cuda"), None), weakref.ref(starts)

    replay, starts = record()
    gc.collect()
    assert starts() is not None
    assert replay().tolist() == [1, 2, 3]
    del replay
    gc.collect()
    assert starts() is None


@pytest.mark.parametrize(
    ("emulated", "exact", "dtype"),
    [(True, True, torch.bfloat16), (True, False, torch.float16)],
    ids=["A10G", "T4"],
)
def test_bfloat16_is_taken_where_the_gpu_has_it(
    emulated: bool, exact: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return emulated if including_emulation else exact

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert compute_dtype("auto", torch.device("cuda")) is dtype


def test_whoever_waits_for_a_gpu_does_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    made = mock.Mock()
    made.return_value.elapsed_time.return_value = 1500.0
    monkeypatch.setattr(torch.cuda, "Event", made)
    timer = DeviceTimer(torch.device("cuda"))
    timer.end()
    assert timer.wait() == 1.5
    assert made.call_args_list == [mock.call(enable_timing=True, blocking=True)] * 2


def test_the_interpreters_switch_interval_is_a_gpus_only() -> None:
    before = sys.getswitchinterval()
    try:
        switch_threads_quickly(torch.device("cpu"))
        assert sys.getswitchinterval() == before
        switch_threads_quickly(torch.device("cuda"))
        assert sys.getswitchinterval() == pytest.approx(0.001)
    finally:
        sys.setswitchinterval(before)


def test_float16_is_for_gpus() -> None:
    with pytest.raises(ValueError, match="float16"):
        compute_dtype("float16", torch.device("cpu"))
    assert compute_dtype("float16", torch.device("cuda")) is torch.float16


def test_a_device_is_lost_when_it_cannot_be_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    assert not is_lost(gpu)
    fault = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(torch.cuda, "synchronize", mock.Mock(side_effect=fault))
    assert is_lost(gpu)
    assert not is_lost(torch.device("cpu"))


def test_on_a_cpu_nothing_is_recorded_and_nothing_waited_for() -> None:
    device, run = torch.device("cpu"), mock.Mock()
    assert graph_pool(device) is None
    assert cuda_graph(run, device, None) is run
    rows = torch.zeros(3)
    wait_for(rows)
    keep_for_current_stream(rows)
    assert bytes_on_host(rows) == 12


def test_a_cpu_leaves_its_cores_for_a_part_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("llava_triton.device.time.sleep", slept.append)
    leave_cores(0.004)
    leave_cores(1.0)
    assert slept == [0.001, 0.002]
