"""Pictures: pixel values equal the checkpoint's own processor's, bad ones are refused."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from llava_triton.errors import ErrorCode, SessionError
from llava_triton.images import PixelValues, decode_image, decode_images, encoded_image
from llava_triton.settings import Settings
from tests.properties import given

SETTINGS = Settings()
ROTATED = 6
"""EXIF orientation: turn by 90 degrees to see it upright."""


def scene(mode: str = "RGB", width: int = 97, height: int = 61) -> Image.Image:
    """A picture without any symmetry, smooth here and rough there."""
    noise = np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)
    noise[: height // 2, :, 0] = np.linspace(0, 255, width, dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def rotated_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    return exif


def grey_16_bit() -> Image.Image:
    values = np.arange(60 * 80, dtype=np.uint16).reshape(60, 80) * 13
    return Image.fromarray(values)


FILES: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: encoded(scene(), "PNG"),
    "PNG, interlace of one row": lambda: encoded(scene(width=64, height=1), "PNG"),
    "PNG, palette": lambda: encoded(scene("P"), "PNG"),
    "PNG, palette with transparency": lambda: encoded(scene("P"), "PNG", transparency=3),
    "PNG, alpha": lambda: encoded(with_alpha(scene()), "PNG"),
    "PNG, grey": lambda: encoded(scene("L"), "PNG"),
    "PNG, grey and alpha": lambda: encoded(with_alpha(scene()).convert("LA"), "PNG"),
    "PNG, 1 bit": lambda: encoded(scene("1"), "PNG"),
    "PNG, 16 bit grey": lambda: encoded(grey_16_bit(), "PNG"),
    "PNG, rotated by EXIF": lambda: encoded(scene(), "PNG", exif=rotated_exif()),
    "JPEG": lambda: encoded(scene(), "JPEG"),
    "JPEG, progressive": lambda: encoded(scene(), "JPEG", progressive=True),
    "JPEG, CMYK": lambda: encoded(scene("CMYK"), "JPEG"),
    "JPEG, grey": lambda: encoded(scene("L"), "JPEG"),
    "JPEG, rotated by EXIF": lambda: encoded(scene(), "JPEG", exif=rotated_exif()),
    "JPEG, several pictures": lambda: encoded(
        scene(), "MPO", save_all=True, append_images=[scene("L").convert("RGB")]
    ),
    "WebP": lambda: encoded(scene(), "WEBP"),
    "WebP, lossless with alpha": lambda: encoded(with_alpha(scene()), "WEBP", lossless=True),
    "WebP, rotated by EXIF": lambda: encoded(scene(), "WEBP", exif=rotated_exif()),
    "WebP, animated": lambda: encoded(
        scene(), "WEBP", save_all=True, append_images=[scene("L").convert("RGB")]
    ),
    "GIF, animated": lambda: encoded(
        scene("P"), "GIF", save_all=True, append_images=[scene("L").convert("P")]
    ),
    "BMP": lambda: encoded(scene(), "BMP"),
    "3 pixels high": lambda: encoded(scene(width=40, height=3), "PNG"),
    "1 pixel": lambda: encoded(scene(width=1, height=1), "PNG"),
    "tall": lambda: encoded(scene(width=20, height=500), "JPEG"),
}


@pytest.fixture(scope="module")
def processor_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-1.5's processor, for small pictures."""
    directory = tmp_path_factory.mktemp("processor")
    values = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 56},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 56, "width": 56},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(values))
    return directory


@pytest.fixture(scope="module")
def pixel_values(processor_directory: Path) -> PixelValues:
    return PixelValues(processor_directory)


@pytest.mark.parametrize("kind", list(FILES))
def test_pixel_values_equal_the_processors_own(
    kind: str, pixel_values: PixelValues, processor_directory: Path, tmp_path: Path
) -> None:
    data = FILES[kind]()
    file = tmp_path / "picture"
    file.write_bytes(data)
    processor = AutoImageProcessor.from_pretrained(processor_directory, backend="pil")
    expected = processor(load_image(str(file)), return_tensors="np")["pixel_values"]
    actual = pixel_values.pixel_values([decode_image(data, SETTINGS)])
    assert actual.dtype == np.float32
    assert actual.shape == (1, 3, 56, 56)
    np.testing.assert_array_equal(actual, expected)


def test_several_pictures_of_different_sizes_make_one_batch(pixel_values: PixelValues) -> None:
    images = decode_images([FILES["PNG"](), FILES["tall"](), FILES["1 pixel"]()], SETTINGS)
    together = pixel_values.pixel_values(images)
    alone = [pixel_values.pixel_values([image]) for image in images]
    np.testing.assert_array_equal(together, np.concatenate(alone))
    assert together.flags.c_contiguous


def test_a_rotated_picture_stands_upright() -> None:
    upright = decode_image(FILES["JPEG, rotated by EXIF"](), SETTINGS)
    assert upright.size == (61, 97)
    assert upright.mode == "RGB"


@pytest.mark.parametrize("kind", list(FILES))
def test_raw_base64_and_data_uri_are_the_same_picture(kind: str) -> None:
    data = FILES[kind]()
    text = base64.b64encode(data)
    assert encoded_image(data) == data
    assert encoded_image(text) == data
    assert encoded_image(base64.encodebytes(data)) == data
    assert encoded_image(b"data:image/png;base64," + text) == data
    assert encoded_image(b"DATA:;charset=x;BASE64," + text) == data


def png_of_size(width: int, height: int) -> bytes:
    """A PNG file of a few bytes whose header promises so many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def refusal(items: list[bytes], settings: Settings = SETTINGS) -> str:
    with pytest.raises(SessionError) as caught:
        decode_images(items, settings)
    assert caught.value.code is ErrorCode.INVALID_ARG
    assert len(caught.value.sentence) < 400
    return caught.value.sentence


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (b"", "image is empty; expected an encoded picture (PNG, JPEG, WEBP, GIF, BMP)"),
        (b"\x00" * 100_000, "image is no picture: 100000 bytes that begin with '\\x00"),
        (b"%PDF-1.7 ...", "image is no picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image is no picture"),
        ("ein Bild, äh".encode(), "image is no picture"),
        (b"hello", "looks like base64 text but is not"),
        (b"aGVsbG8=", "image is no picture: 5 bytes that begin with 'hello'"),
        (b"data:image/png,abc", "data URI that begins with 'data:image/png,a' ...; it must be"),
        (b"data:image/png;base64", "data URI that begins with"),
        (b"data:image/png;base64,@@@@", "looks like base64 text but is not"),
        (b"data:image/png;base64,", "image is no picture: 0 bytes"),
        (b"II*\x00" + bytes(200), "image is no picture"),
        (b"\x89PNG\r\n\x1a\n", "image is"),
        (b"RIFF\x10\x00\x00\x00WEBPVP8 ", "image is"),
        (b"BM" + bytes(60), "image is"),
    ],
)
def test_what_is_no_picture_is_refused(item: bytes, said: str) -> None:
    assert said in refusal([item])


def test_the_bad_one_of_several_is_named() -> None:
    good = FILES["PNG"]()
    assert refusal([good, b"\x01\x02", good]).startswith("image 2 of 3 is no picture: 2 bytes")


@pytest.mark.parametrize(
    ("width", "height"), [(10_000, 5_001), (60_000, 60_000), (2**31 - 1, 2**31 - 1)]
)
def test_a_decompression_bomb_is_refused_by_its_header(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: Any) -> None:
        pytest.fail("the picture was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    said = refusal([png_of_size(width, height)])
    assert f"{width} x {height} = {width * height} pixels; the limit is 50000000" in said


def test_a_picture_at_the_limit_is_decoded() -> None:
    settings = Settings(max_image_pixels=97 * 61)
    assert decode_image(FILES["PNG"](), settings).size == (97, 61)
    assert "the limit is 5916" in refusal([FILES["PNG"]()], Settings(max_image_pixels=97 * 61 - 1))


def test_a_thread_of_pixels_is_refused() -> None:
    # Scaled to 336 pixels on its shorter side, it would be 67 gigabytes large.
    assert "100 times as long" in refusal([png_of_size(1, 50_000_000)])
    assert "100 times as long" in refusal([png_of_size(101, 1)])
    assert decode_image(encoded(scene(width=100, height=1), "PNG"), SETTINGS).size == (100, 1)


def test_a_file_that_is_too_long_is_refused() -> None:
    data = FILES["BMP"]()
    said = refusal([data], Settings(max_image_bytes=len(data) - 1))
    assert said == f"image is {len(data)} bytes long; the limit is {len(data) - 1}: scale it down"


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "JPEG, progressive", "WebP", "GIF, animated", "BMP"]
)
def test_a_truncated_file_is_refused(kind: str) -> None:
    data = FILES[kind]()
    for length in range(20, len(data) * 6 // 10, max(1, len(data) // 40)):
        if kind == "GIF, animated" and length > len(data) * 4 // 10:
            break  # the first frame is complete
        assert "image is" in refusal([data[:length]])


@given(kind=st.sampled_from(list(FILES)), flips=st.integers(1, 30), seed=st.integers(0, 2**32 - 1))
def test_a_damaged_file_is_decoded_or_refused(kind: str, flips: int, seed: int) -> None:
    data, chance = bytearray(FILES[kind]()), random.Random(seed)
    for _ in range(flips):
        data[chance.randrange(len(data))] = chance.randrange(256)
    try:
        [image] = decode_images([bytes(data)], Settings(max_image_pixels=10**6))
    except SessionError:
        refusal([bytes(data)], Settings(max_image_pixels=10**6))
    else:
        assert image.mode == "RGB"


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_in_a_sentence(data: bytes) -> None:
    refusal([data])
