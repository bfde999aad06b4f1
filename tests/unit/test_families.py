"""What each family makes of pictures: tiles and rows, against transformers' own."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    SiglipVisionConfig,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from demo.random_checkpoint import GRIDS
from llava_triton.checkpoint.configuration import llava_config
from llava_triton.checkpoint.families import FAMILIES, Family, VideoFamily, family_of
from llava_triton.contract.settings import Settings
from llava_triton.pictures.decode import open_picture
from llava_triton.pictures.tiles import PixelValues
from tests.checkpoints import tiny_llava

SIZES = [
    *((1, 1), (1, 30), (30, 1), (3, 3), (13, 50), (64, 64), (28, 56), (56, 28), (57, 111)),
    *((90, 60), (300, 200), (200, 300), (112, 112), (113, 112), (640, 480), (480, 640)),
    *((1000, 10), (10, 1000), (4000, 300), (300, 4000)),
]
"""Width and height: smaller than a tile, of a tile, of a pinpoint and one off, thin, large."""
TILED = ["llava_next", "llava_next_video", "llava_onevision"]
SIDE, PATCH, WIDTH = 28, 14, 16
POOLED = {"llava_next_video": 1}
"""Rows behind those of a tile, which a frame has instead."""


def config_of(family: str, side: int = SIDE) -> Any:
    tower = SiglipVisionConfig if family == "llava_onevision" else CLIPVisionConfig
    return FAMILIES[family].config_class(
        vision_config=tower(
            image_size=side,
            patch_size=PATCH,
            hidden_size=12,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=1,
        ),
        text_config=LlamaConfig(
            vocab_size=8,
            hidden_size=WIDTH,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        ),
        image_grid_pinpoints=[[lines * side, columns * side] for lines, columns in GRIDS[family]],
    )


@pytest.fixture(scope="module", params=TILED)
def model(request: pytest.FixtureRequest) -> Any:
    """Transformers' model of a family, with hardly any weights."""
    return AutoModelForImageTextToText.from_config(config_of(request.param))


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_rows_equal_transformers(model: Any, width: int, height: int) -> None:
    family: Family = family_of(model.config)
    kind = model.config.model_type
    tokens = (SIDE // PATCH) ** 2
    shape = (family.num_tiles(height, width), tokens + POOLED.get(kind, 0), WIDTH)
    encoded = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tiles = encoded[:, :tokens]
    newline = model.model.image_newline.detach()
    options = {}
    if kind != "llava_onevision":
        options["vision_feature_select_strategy"] = "default"
    (expected,), _ = model.model.pack_image_features(
        [tiles], torch.tensor([[height, width]]), image_newline=newline, **options
    )
    rows = family.rows(encoded, height, width, newline)
    assert torch.equal(rows, expected)
    assert family.num_tokens(height, width, shape[1]) == len(expected)
    assert torch.equal(rows[:tokens], tiles[0])


@pytest.mark.parametrize("frames", [1, 2, 17])
def test_rows_of_videos_equal_transformers(frames: int) -> None:
    """LLaVA-NeXT-Video pools before the projector: see `tests/export/test_vision_encoder.py`."""
    for side in (28, 42, 70):  # an even number of patches a side, and odd ones
        model: Any = AutoModelForImageTextToText.from_config(config_of("llava_onevision", side))
        family = family_of(model.config)
        assert isinstance(family, VideoFamily)
        tokens = (side // PATCH) ** 2
        shape = (frames, tokens, WIDTH)
        encoded = torch.randn(shape, generator=torch.Generator().manual_seed(side))
        newline = model.model.image_newline.detach()
        expected = torch.cat([model.model.apply_pooling(encoded).flatten(0, 1), newline[None]])
        rows = family.video_rows(encoded, newline)
        assert torch.equal(rows, expected)
        assert family.num_video_tokens(frames, tokens) == len(expected)


@pytest.fixture(scope="module", params=TILED)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    vision = "siglip" if request.param == "llava_onevision" else "clip"
    folder = tmp_path_factory.mktemp(request.param)
    return tiny_llava(folder / "checkpoint", family=request.param, vision=vision)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_tiles_equal_the_checkpoints_own_processor(
    checkpoint: Path, width: int, height: int
) -> None:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    expected = processor(images=picture, return_tensors="np")
    family = family_of(llava_config(checkpoint))
    settings = Settings()
    pixel_values = PixelValues(checkpoint, whole=family.takes_whole_pictures)
    for kind in ("PNG", "JPEG"):
        file = io.BytesIO()
        picture.save(file, kind, quality=95)
        tiles = pixel_values.of_open(open_picture(file.getvalue(), settings))
        assert (tiles.height, tiles.width) == (height, width)
        assert len(tiles.pixels) == family.num_tiles(height, width)
        if kind == "PNG":
            np.testing.assert_array_equal(tiles.pixels, expected["pixel_values"][0])


def test_a_turned_photograph_is_cut_into_tiles_as_it_stands_upright(checkpoint: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it
    file = io.BytesIO()
    Image.new("RGB", (600, 100)).save(file, "JPEG", exif=exif)
    tiles = PixelValues(checkpoint, whole=True).of_open(open_picture(file.getvalue(), Settings()))
    assert (tiles.height, tiles.width) == (600, 100)
    family = family_of(llava_config(checkpoint))
    assert len(tiles.pixels) == family.num_tiles(600, 100)


def test_published_sizes_of_videos() -> None:
    """What docs/families.md says of the published checkpoints."""
    for name, side, tile_tokens, tokens in (
        ("llava_next_video", 336, 576 + 144, [144, 1152, 2304, 4608]),
        ("llava_onevision", 384, 729, [197, 1569, 3137, 6273]),
    ):
        family = family_of(config_of(name, side))
        assert isinstance(family, VideoFamily)
        assert [family.num_video_tokens(each, tile_tokens) for each in (1, 8, 16, 32)] == tokens


def test_published_sizes_of_pictures() -> None:
    """What docs/families.md says of the published checkpoints."""
    following, onevision = config_of("llava_next", 336), config_of("llava_onevision", 384)
    counted = {
        size: (
            family_of(following).num_tokens(*size, 576),
            family_of(onevision).num_tokens(*size, 729),
        )
        for size in [(336, 336), (672, 672), (768, 1024), (1024, 768), (300, 4000), (2304, 2304)]
    }
    assert counted == {
        (336, 336): (1176, 1485),
        (672, 672): (2928, 3699),
        (768, 1024): (2340, 4725),
        (1024, 768): (2352, 4744),
        (300, 4000): (1014, 2848),
        (2304, 2304): (2928, 7371),
    }
