"""The LLaVA families that are served, by the `model_type` of their config.json: a file each."""

from __future__ import annotations

from llava_triton.checkpoint.families.base import Config, Family, VideoFamily
from llava_triton.checkpoint.families.llava import Llava
from llava_triton.checkpoint.families.llava_next import LlavaNext
from llava_triton.checkpoint.families.llava_next_video import LlavaNextVideo
from llava_triton.checkpoint.families.llava_onevision import LlavaOnevision

__all__ = ["FAMILIES", "Config", "Family", "VideoFamily", "family_of"]

FAMILIES: dict[str, type[Family]] = {
    "llava": Llava,
    "llava_next": LlavaNext,
    "llava_next_video": LlavaNextVideo,
    "llava_onevision": LlavaOnevision,
}


def family_of(config: Config) -> Family:
    """What is special about the pictures of a checkpoint with this configuration."""
    return FAMILIES[config.model_type](config)
