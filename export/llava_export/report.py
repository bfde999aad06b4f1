"""How far an exported vision encoder is from PyTorch in float32."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_export.errors import ExportError

Encode = Callable[[np.ndarray], np.ndarray]
"""float32 pixel values [N, 3, H, W] -> float32 features [N, T, D]."""


@dataclass(frozen=True)
class Tolerance:
    """What an encoder may be off by."""

    max_error: float
    """Largest difference of one value, in units of the root mean square of PyTorch's features."""
    min_cosine: float
    """Least cosine between one token's features and PyTorch's."""


TOLERANCES = {
    "fp32": Tolerance(max_error=1e-4, min_cosine=0.999999),
    "fp16": Tolerance(max_error=5e-2, min_cosine=0.9999),
}


@dataclass(frozen=True)
class Row:
    """The errors of one batch, computed by one of the exported encoders."""

    computed_by: str
    pixels: str
    """"noise" or "pictures"."""
    batch: int
    max_abs: float
    """Largest absolute difference."""
    max_relative: float
    """Largest difference relative to the value itself or, where that is smaller, to the root mean
    square of all: values near zero would say nothing."""
    max_scaled: float
    """`max_abs` in units of that root mean square."""
    min_cosine: float


@dataclass(frozen=True)
class Report:
    """The comparison of one encoder, over several batches."""

    precision: str
    note: str
    """What was compared, and what could not be."""
    tolerance: Tolerance
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether every batch is within tolerance (a NaN never is)."""
        return all(
            row.max_scaled <= self.tolerance.max_error
            and row.min_cosine >= self.tolerance.min_cosine
            for row in self.rows
        )

    def table(self) -> str:
        """The rows as text."""
        head = "  computed by      pixels     batch   max abs   max rel   max abs/rms   min cosine"
        lines = [f"  features against PyTorch's in float32 ({self.note}):", head]
        lines += [
            f"  {row.computed_by:<15}  {row.pixels:<9} {row.batch:>6} {row.max_abs:>9.1e} "
            f"{row.max_relative:>9.1e} {row.max_scaled:>13.1e}   {row.min_cosine:.8f}"
            for row in self.rows
        ]
        allowed = self.tolerance
        lines.append(f"  allowed {allowed.max_error:>57.1e}   {allowed.min_cosine:.8f}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(asdict(self) | {"passed": self.passed}, indent=2) + "\n"

    def require(self) -> None:
        """Accept the encoder or not.

        Raises:
            ExportError: a batch is out of tolerance.
        """
        if not self.passed:
            raise ExportError(
                f"the exported {self.precision} encoder is too far from PyTorch and is not used:\n"
                f"{self.table()}"
            )


def compare(
    reference: Encode,
    exported: Mapping[str, Encode],
    image_processor: Any,
    *,
    max_batch: int,
    precision: str,
    note: str,
) -> Report:
    """Run encoders on noise and on picture-like pixels, in batches of several sizes.

    Args:
        reference: PyTorch in float32.
        exported: the encoders in question, by the name of what computes them.
        image_processor: the checkpoint's own.
        max_batch: the largest batch that is served.
        precision: "fp32" or "fp16"; picks the tolerance.
        note: for the reader.
    """
    rows = []
    for kind, pixels in _batches(image_processor, max_batch):
        expected = reference(pixels)
        rows += [_row(name, kind, expected, encode(pixels)) for name, encode in exported.items()]
    return Report(precision, note, TOLERANCES[precision], tuple(rows))


def onnx_encoder(path: Path) -> Encode:
    """An ONNX file run by ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda pixels: session.run(None, {name: pixels})[0]


def _row(name: str, kind: str, expected: np.ndarray, found: np.ndarray) -> Row:
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    if expected.shape != found.shape:
        raise ExportError(
            f"the exported encoder gives features {found.shape}, not {expected.shape}"
        )
    error = np.abs(expected - found)
    rms = float(np.sqrt(np.mean(expected**2)))
    lengths = np.linalg.norm(expected, axis=-1) * np.linalg.norm(found, axis=-1)
    cosines = (expected * found).sum(axis=-1) / np.maximum(lengths, 1e-30)
    return Row(
        computed_by=name,
        pixels=kind,
        batch=len(expected),
        max_abs=float(error.max()),
        max_relative=float((error / np.maximum(np.abs(expected), rms)).max()),
        max_scaled=float(error.max()) / rms,
        min_cosine=float(cosines.min()),
    )


def _batches(image_processor: Any, max_batch: int) -> Iterator[tuple[str, np.ndarray]]:
    random = np.random.default_rng(0)
    middle = min(3, max_batch)
    for kind, batch in (("noise", 1), ("pictures", 1), ("noise", middle), ("pictures", max_batch)):
        pictures = [_picture(random) for _ in range(batch)]
        pixels = image_processor(pictures, return_tensors="np")["pixel_values"]
        # Of several tiles a picture, as many as the batch has.
        pixels = np.reshape(pixels, (-1, *np.shape(pixels)[-3:]))[:batch]
        if kind == "noise":
            pixels = random.standard_normal(np.shape(pixels))
        yield kind, np.asarray(pixels, dtype=np.float32)


def _picture(random: np.random.Generator) -> Image.Image:
    """A smooth scene with one sharp-edged object and a little grain, as photographs have."""
    width, height = (int(side) for side in random.integers(200, 600, 2))
    coarse = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    scene = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    values = scene + random.normal(0, 6, scene.shape)
    top, left = height // 4, width // 3
    values[top : top + height // 3, left : left + width // 4] = random.integers(0, 256, 3)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))
