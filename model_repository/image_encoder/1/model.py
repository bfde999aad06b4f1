"""What Triton loads; `llava_triton.serving.image_encoder` has the class."""

from __future__ import annotations

import triton_python_backend_utils as pb_utils

from llava_triton.serving.image_encoder import ImageEncoder


class TritonPythonModel(ImageEncoder):
    """`image_encoder`."""

    def __init__(self) -> None:
        super().__init__(pb_utils)
