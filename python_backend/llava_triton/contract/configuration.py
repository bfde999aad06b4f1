"""What models take and give, as `config.pbtxt` files say it.

Everything else in those files is written by hand. They are kept, not made by the export: Triton
and people read a checkout's as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llava_triton.contract.models import MODELS
from llava_triton.contract.tensors import TensorSpec

_NAME = re.compile(r'^name: "(\w+)"$', re.M)
_SECTION = re.compile(r"^(input|output) \[.*?\]$", re.M | re.S)
_STEP = re.compile(
    r'^(?P<head>(?P<indent> *)model_name: "(?P<model>\w+)"\n *model_version: -1\n)'
    r"(?: *(?:in|out)put_map .*\n)*",
    re.M,
)


def configured(text: str) -> str:
    """The text of a `config.pbtxt` with the inputs and outputs of the table: its sections `input`
    and `output`, and in an ensemble the maps of each step, whose tensors keep their names."""
    found = _NAME.search(text)
    assert found is not None
    model = MODELS[found[1]]
    sections = {
        "input": _section("input", model.inputs),
        "output": _section("output", model.outputs),
    }
    text = _SECTION.sub(lambda match: sections[match[1]], text)
    return _STEP.sub(lambda match: match["head"] + _maps(match["model"], match["indent"]), text)


def _section(kind: str, specs: Sequence[TensorSpec]) -> str:
    rows = [
        (
            f'name: "{spec.name}"',
            f"data_type: TYPE_{'STRING' if spec.datatype == 'BYTES' else spec.datatype}",
            f"dims: [ {', '.join(map(str, spec.shape))} ]",
            *(["optional: true"] if spec.optional and kind == "input" else []),
        )
        for spec in specs
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)] + [0]
    lines = [
        "  { "
        + " ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        + " }"
        for row in rows
    ]
    return f"{kind} [\n" + ",\n".join(lines) + "\n]"


def _maps(model: str, indent: str) -> str:
    both = (("input_map", MODELS[model].inputs), ("output_map", MODELS[model].outputs))
    return "".join(
        f'{indent}{kind} {{ key: "{spec.name}" value: "{spec.name}" }}\n'
        for kind, specs in both
        for spec in specs
    )
