"""What Triton loads; `llava_triton.serving.answer_collector` has the class."""

from __future__ import annotations

import triton_python_backend_utils as pb_utils

from llava_triton.serving.answer_collector import AnswerCollector


class TritonPythonModel(AnswerCollector):
    """`answer_collector`."""

    def __init__(self) -> None:
        super().__init__(pb_utils)
