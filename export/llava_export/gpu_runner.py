"""Runs a plan on the GPU it was built for, to compare its features before it is accepted."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from llava_export.errors import ExportError
from llava_export.report import Encode
from llava_triton.contract.models import ENCODED, PIXEL_VALUES


def engine_encoder(tensorrt: ModuleType, plan: Path) -> Encode:
    """The engine in `plan`, run on the first GPU.

    Raises:
        ExportError: the engine cannot be loaded on this machine.
    """
    runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise ExportError(f"TensorRT {tensorrt.__version__} cannot load the engine it has built")
    context = engine.create_execution_context()

    def encode(pixels: np.ndarray) -> np.ndarray:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            given = torch.from_numpy(pixels).cuda().contiguous()
            context.set_input_shape(PIXEL_VALUES.name, tuple(given.shape))
            features = torch.empty(tuple(context.get_tensor_shape(ENCODED.name)), device="cuda")
            context.set_tensor_address(PIXEL_VALUES.name, given.data_ptr())
            context.set_tensor_address(ENCODED.name, features.data_ptr())
            if not context.execute_async_v3(stream.cuda_stream):
                raise ExportError("the engine does not run on this GPU")
        stream.synchronize()
        result: np.ndarray = features.cpu().numpy()
        return result

    return encode
