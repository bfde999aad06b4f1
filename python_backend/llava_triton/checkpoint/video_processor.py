"""A checkpoint's own video processor: what becomes of each frame.

Transformers' class needs torchvision, whose wheels fit one build of torch each. So its numbers are
read here, and `llava_triton.pictures.frame_pixels` does what it does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_triton.checkpoint.weights import CheckpointError

_NESTED, _KEY = "processor_config.json", "video_processor"
_OWN = "video_preprocessor_config.json"
_PICTURES = "preprocessor_config.json"
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MODES = {2: "bilinear", 3: "bicubic"}
"""Of torch, by Pillow's numbers of filters."""


@dataclass(frozen=True)
class VideoProcessor:
    """How a frame becomes pixel values."""

    shortest_edge: int | None
    """Pixels that its shorter side is scaled to; None: it is scaled to `size`."""
    size: tuple[int, int] | None
    """Height and width."""
    mode: str
    """One of `MODES`."""
    crop: tuple[int, int] | None
    """Height and width of the middle that is kept; None: all of it."""
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_frames: int | None
    """That are shown of a video; None: it does not say."""

    @property
    def output(self) -> tuple[int, int] | None:
        """Height and width of the pixel values; None: they differ from video to video."""
        return self.crop or self.size

    def save(self, directory: Path) -> None:
        """Write it where `load_video_processor` finds it."""
        size: dict[str, int] = {}
        if self.shortest_edge is not None:
            size = {"shortest_edge": self.shortest_edge}
        elif self.size is not None:
            size = {"height": self.size[0], "width": self.size[1]}
        crop = self.crop and {"height": self.crop[0], "width": self.crop[1]}
        resample = {mode: number for number, mode in MODES.items()}[self.mode]
        values = {
            "size": size,
            "resample": resample,
            "do_center_crop": crop is not None,
            "crop_size": crop,
            "rescale_factor": self.scale,
            "image_mean": self.mean,
            "image_std": self.std,
            "num_frames": self.num_frames,
        }
        (directory / _OWN).write_text(json.dumps(values, indent=2) + "\n")


def load_video_processor(directory: Path) -> VideoProcessor:
    """The video processor of a checkpoint's directory, from where transformers reads it.

    Raises:
        CheckpointError: there is none, or none that can be followed.
    """
    try:
        return _read(_values(directory))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{directory} has no usable video processor ({error}); add the {_OWN} of the "
            "checkpoint that it was made from"
        ) from error


def _values(directory: Path) -> dict[str, Any]:
    nested = directory / _NESTED
    if nested.is_file():
        values = json.loads(nested.read_text()).get(_KEY)
        if values is not None:
            return dict(values)
    own = directory / _OWN
    return dict(json.loads((own if own.is_file() else directory / _PICTURES).read_text()))


def _read(values: dict[str, Any]) -> VideoProcessor:
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not values.get(name, True):
            raise ValueError(f"its {name} is false")
    size = _sides(values["size"])
    resample = values.get("resample", 3)
    if resample not in MODES:
        raise ValueError(f"its resample is {resample!r}, which is none of {sorted(MODES)}")
    crop = _sides(values["crop_size"]) if values.get("do_center_crop") else None
    shortest = size if isinstance(size, int) else None
    return VideoProcessor(
        shortest_edge=shortest,
        size=size if isinstance(size, tuple) else None,
        mode=MODES[resample],
        crop=(crop, crop) if isinstance(crop, int) else crop,
        scale=float(values.get("rescale_factor", 1 / 255)),
        mean=tuple(values.get("image_mean") or _CLIP_MEAN),
        std=tuple(values.get("image_std") or _CLIP_STD),
        num_frames=values.get("num_frames"),
    )


def _sides(value: Any) -> int | tuple[int, int]:
    """A shorter side, or height and width."""
    if isinstance(value, int):
        return value
    if "height" in value and "width" in value:
        return int(value["height"]), int(value["width"])
    if value.get("longest_edge") is None and "shortest_edge" in value:
        return int(value["shortest_edge"])
    raise ValueError(f"a size is {value!r}")
