"""ONNX graph -> TensorRT plan, by TensorRT or by TensorRT for RTX: one code path for both.

TensorRT itself (`tensorrt`) comes with NVIDIA's containers, is what Triton's TensorRT backend
loads, and builds for the GPU of the machine it runs on. TensorRT for RTX (`tensorrt_rtx_bindings`,
from PyPI) builds without a GPU, for the compute capabilities it knows.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from llava_export.errors import ExportError
from llava_triton.contract.models import PIXEL_VALUES

RTX = "tensorrt_rtx_bindings"
_MODULES = ("tensorrt", RTX)


def find_tensorrt() -> ModuleType:
    """The TensorRT to build with: `tensorrt` where it is installed, else TensorRT for RTX.

    Raises:
        ExportError: neither is installed.
    """
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise ExportError(f"{name} is installed but cannot be imported: {error}") from error
        except (ImportError, OSError) as error:
            raise ExportError(f"{name} is installed but cannot be imported: {error}") from error
    raise ExportError(
        "--target gpu needs TensorRT, and none is installed; run the export in NVIDIA's Triton or "
        "TensorRT container, or install TensorRT for RTX with `pip install -e '.[tensorrt]'`"
    )


def check_capability(tensorrt: ModuleType, requested: str | None) -> str:
    """The compute capability to build for, such as "8.6".

    Args:
        tensorrt: what builds.
        requested: what the user asked for; None for this machine's GPU.

    Raises:
        ExportError: there is no GPU to take it from, or `tensorrt` cannot build for it.
    """
    local = local_compute_capability()
    capability = requested or local
    if capability is None:
        raise ExportError(
            "this machine has no NVIDIA GPU to build for; name one with --compute-capability "
            "(7.5 for a T4, 8.6 for an A10G, 8.9 for an L4)"
        )
    if tensorrt.__name__ == RTX:
        known = _known_capabilities(tensorrt)
        if capability not in known:
            raise ExportError(
                f"TensorRT for RTX {tensorrt.__version__} cannot build for compute capability "
                f"{capability}, only for {', '.join(known)}; "
                "build with TensorRT itself, on a machine with that GPU"
            )
    elif capability != local:
        raise ExportError(
            f"TensorRT {tensorrt.__version__} builds for this machine's GPU only "
            f"(compute capability {local or 'none: there is no GPU'}), not for {capability}; "
            "run the export on a machine with that GPU"
        )
    return capability


def local_compute_capability() -> str | None:
    """The first GPU's compute capability; None without one. Asks the driver itself, in no time."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    )
    return None if failed else f"{major.value}.{minor.value}"


def build_engine(
    tensorrt: ModuleType,
    onnx: Path,
    plan: Path,
    *,
    capability: str,
    input_shape: tuple[int, int, int],
    max_batch: int,
) -> None:
    """Build a plan with batches of 1 to `max_batch` pictures, tuned for one: a turn's picture.

    The network is strongly typed: every operation runs in the type that the graph says.

    Args:
        tensorrt: from `find_tensorrt`.
        onnx: the graph; float32 in and out.
        plan: where to write; appears whole or not at all.
        capability: from `check_capability`.
        input_shape: pixel values of one picture, [3, H, W].
        max_batch: pictures.

    Raises:
        ExportError: the graph is refused or the build fails; says why.
    """
    log = _logger(tensorrt)
    builder = tensorrt.Builder(log)
    flag = tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(flag))
    parser = tensorrt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise ExportError(f"TensorRT cannot read the ONNX graph: {'; '.join(errors)}")
    config = builder.create_builder_config()
    config.clear_flag(tensorrt.BuilderFlag.TF32)  # its products have 10 bits: not what fp32 says
    profile = builder.create_optimization_profile()
    profile.set_shape(
        PIXEL_VALUES.name, (1, *input_shape), (1, *input_shape), (max_batch, *input_shape)
    )
    config.add_optimization_profile(profile)
    if tensorrt.__name__ == RTX:
        config.num_compute_capabilities = 1
        config.set_compute_capability(_capability_member(tensorrt, capability), 0)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        reasons = "; ".join(log.errors) or "it gives no reason"
        raise ExportError(f"TensorRT {tensorrt.__version__} cannot build the engine: {reasons}")
    partial = plan.with_name(f"{plan.name}.partial")
    with partial.open("wb") as file:
        file.write(serialized)
    os.replace(partial, plan)


def _known_capabilities(tensorrt: ModuleType) -> list[str]:
    """Compute capabilities that TensorRT for RTX names, such as "8.6"."""
    members = (name.removeprefix("SM") for name in tensorrt.ComputeCapability.__members__)
    return [f"{name[:-1]}.{name[-1]}" for name in members if name.isdigit()]


def _capability_member(tensorrt: ModuleType, capability: str) -> Any:
    return getattr(tensorrt.ComputeCapability, f"SM{capability.replace('.', '')}")


def _logger(tensorrt: ModuleType) -> Any:
    """A logger that keeps errors for the message of the exception, and prints nothing."""

    class Log(tensorrt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= tensorrt.ILogger.ERROR:
                self.errors.append(message)

    return Log()
