"""What Triton loads; `llava_triton.serving.language_model` has the class."""

from __future__ import annotations

import triton_python_backend_utils as pb_utils

from llava_triton.serving.language_model import LanguageModel


class TritonPythonModel(LanguageModel):
    """`language_model`."""

    def __init__(self) -> None:
        super().__init__(pb_utils)
