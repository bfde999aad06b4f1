"""What Triton loads; `llava_triton.serving.disconnect_watch` has the class."""

from __future__ import annotations

import triton_python_backend_utils as pb_utils

from llava_triton.serving.disconnect_watch import DisconnectWatch


class TritonPythonModel(DisconnectWatch):
    """`disconnect_watch`."""

    def __init__(self) -> None:
        super().__init__(pb_utils)
