"""On the path of vLLM's processes, so that Python runs it first in each.

A package index may have torchvision for CUDA only. Its operators cannot be loaded beside a torch
for CPUs, and importing it fails, because it looks for two of them. vLLM needs only what is written
in Python. So those two are declared, where the real ones cannot be loaded.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

_library = None  # it is undone when it is collected
_torchvision = find_spec("torchvision")
if _torchvision is not None and _torchvision.origin is not None:
    try:
        torch.ops.load_library(str(Path(_torchvision.origin).with_name("_C.so")))
    except OSError:
        _library = torch.library.Library("torchvision", "DEF")
        for _name in ("nms", "qnms"):
            _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
