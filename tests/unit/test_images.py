"""Pictures: pixel values equal the checkpoint's own processor's, bad ones are refused."""

from __future__ import annotations

import base64
import io
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

from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.contract.settings import Settings
from llava_triton.pictures.decode import (
    encoded_image,
    numbered,
    open_picture,
)
from llava_triton.pictures.tiles import PixelValues
from tests.properties import given


def decode_image(item: bytes, settings: Settings, side: int | None = None) -> Image.Image:
    return open_picture(item, settings).decode(side)


SETTINGS = Settings()
CHECKPOINT = Path(__file__).resolve().parents[2] / "demo" / "checkpoint"
SIDE = 96
"""Pixels that the demo checkpoint's processor makes of a picture, across and down."""
ORIENTATIONS = range(1, 9)
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


def rotated_exif(orientation: int = ROTATED) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def rotated_jpeg(orientation: int) -> Callable[[], bytes]:
    return lambda: encoded(scene(), "JPEG", exif=rotated_exif(orientation))


def grey_16_bit() -> Image.Image:
    values = np.arange(60 * 80, dtype=np.uint16).reshape(60, 80) * 13
    return Image.fromarray(values)


FILES: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: encoded(scene(), "PNG"),
    "PNG, interlace of one row": lambda: encoded(scene(width=64, height=1), "PNG"),
    "PNG, palette": lambda: encoded(scene("P"), "PNG"),
    "PNG, grey": lambda: encoded(scene("L"), "PNG"),
    "PNG, 1 bit": lambda: encoded(scene("1"), "PNG"),
    "PNG, rotated by EXIF": lambda: encoded(scene(), "PNG", exif=rotated_exif()),
    "JPEG": lambda: encoded(scene(), "JPEG"),
    "JPEG, progressive": lambda: encoded(scene(), "JPEG", progressive=True),
    "JPEG, CMYK": lambda: encoded(scene("CMYK"), "JPEG"),
    "JPEG, grey": lambda: encoded(scene("L"), "JPEG"),
    **{f"JPEG, EXIF orientation {which}": rotated_jpeg(which) for which in ORIENTATIONS},
    "JPEG, several pictures": lambda: encoded(
        scene(), "MPO", save_all=True, append_images=[scene("L").convert("RGB")]
    ),
    "WebP": lambda: encoded(scene(), "WEBP"),
    "WebP, rotated by EXIF": lambda: encoded(scene(), "WEBP", exif=rotated_exif()),
    "WebP, animated": lambda: encoded(
        scene(), "WEBP", save_all=True, append_images=[scene("L").convert("RGB")]
    ),
    "GIF, animated": lambda: encoded(
        scene("P"), "GIF", save_all=True, append_images=[scene("L").convert("P")]
    ),
    "BMP": lambda: encoded(scene(), "BMP"),
    "TIFF": lambda: encoded(scene(), "TIFF"),
    "TIFF, LZW": lambda: encoded(scene(), "TIFF", compression="tiff_lzw"),
    "TIFF, Deflate, rotated": lambda: encoded(
        scene(), "TIFF", compression="tiff_adobe_deflate", exif=rotated_exif()
    ),
    "TIFF, fax": lambda: encoded(scene("1"), "TIFF", compression="group4"),
    "AVIF": lambda: encoded(scene(), "AVIF", speed=10),
    "HEIC": lambda: encoded(scene(), "HEIF", quality=90),
    "3 pixels high": lambda: encoded(scene(width=40, height=3), "PNG"),
    "1 pixel": lambda: encoded(scene(width=1, height=1), "PNG"),
    "tall": lambda: encoded(scene(width=20, height=500), "JPEG"),
}

SPECIAL: dict[str, Callable[[], bytes]] = {
    "PNG, palette with transparency": lambda: encoded(
        scene("P"), "PNG", transparency=scene("P").getpixel((0, 0))
    ),
    "PNG, alpha": lambda: encoded(with_alpha(scene()), "PNG"),
    "PNG, grey and alpha": lambda: encoded(with_alpha(scene()).convert("LA"), "PNG"),
    "PNG, 16 bit grey": lambda: encoded(grey_16_bit(), "PNG"),
    "TIFF, 16 bit grey": lambda: encoded(grey_16_bit(), "TIFF"),
    "WebP, lossless with alpha": lambda: encoded(with_alpha(scene()), "WEBP", lossless=True),
    "AVIF with alpha": lambda: encoded(with_alpha(scene()), "AVIF", speed=10),
}
"""Files that transformers' own loading shows wrongly: without their shades, or with the colours
that lie under what is transparent."""
ALL = FILES | SPECIAL


@pytest.fixture(scope="module")
def pixel_values() -> PixelValues:
    return PixelValues(CHECKPOINT)


@pytest.fixture(scope="module")
def processor() -> Any:
    """The checkpoint's image processor, as transformers loads it."""
    return AutoImageProcessor.from_pretrained(CHECKPOINT, backend="pil")


@pytest.mark.parametrize("kind", list(FILES))
def test_pixel_values_equal_the_processors_own(
    kind: str, pixel_values: PixelValues, processor: Any, tmp_path: Path
) -> None:
    data = FILES[kind]()
    file = tmp_path / "picture"
    file.write_bytes(data)
    expected = processor(load_image(str(file)), return_tensors="np")["pixel_values"]
    actual = pixel_values.of_open(open_picture(data, SETTINGS)).pixels
    assert actual.dtype == np.float32
    assert actual.shape == (1, 3, SIDE, SIDE)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("kind", [kind for kind in SPECIAL if "16 bit" not in kind])
def test_what_is_transparent_shows_the_background(kind: str) -> None:
    data = SPECIAL[kind]()
    with Image.open(io.BytesIO(data)) as stored:
        layers = np.asarray(stored.convert("RGBA"), float)
    colours, alpha = layers[..., :3], layers[..., 3:] / 255
    assert alpha.min() < 0.1
    for name, background in (("#ffffff", (255, 255, 255)), ("#102030", (16, 32, 48))):
        shown = decode_image(data, Settings(picture_background=name))
        expected = colours * alpha + np.array(background) * (1 - alpha)
        assert np.abs(np.asarray(shown, float) - expected).max() <= 1


@pytest.mark.parametrize("kind", [kind for kind in SPECIAL if "16 bit" in kind])
def test_16_bit_grey_keeps_its_shades(kind: str) -> None:
    shown = np.asarray(decode_image(SPECIAL[kind](), SETTINGS), int)
    expected = np.asarray(grey_16_bit(), int) * 255 / 65_535
    assert np.abs(shown - expected[..., None]).max() <= 1


def photograph(width: int, height: int) -> Image.Image:
    """Large forms with fine grain."""
    rng = np.random.default_rng(3)
    forms = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    picture = np.asarray(forms.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = rng.normal(0, 6, (height, width, 1)).astype(np.int16)
    return Image.fromarray(np.clip(picture + grain, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("orientation", [1, ROTATED])
def test_a_photograph_decoded_at_a_smaller_size_looks_the_same(
    orientation: int, pixel_values: PixelValues, processor: Any
) -> None:
    exif = rotated_exif(orientation)
    data = encoded(photograph(1600, 1200), "JPEG", quality=90, exif=exif)
    whole = decode_image(data, SETTINGS)
    expected = processor(whole, return_tensors="np")["pixel_values"]
    levels = 255 * np.array(processor.image_std)[:, None, None]
    actual = pixel_values.of_open(open_picture(data, SETTINGS)).pixels
    difference = np.abs((actual - expected)[0]) * levels
    assert 0 < difference.mean() < 1
    assert difference.max() < 8
    assert decode_image(data, SETTINGS, side=SIDE).size == tuple(side // 4 for side in whole.size)


@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 100))
def test_a_picture_keeps_twice_the_pixels_that_are_made_of_it(
    width: int, height: int, side: int
) -> None:
    if max(width, height) > 100 * min(width, height):
        return  # refused
    picture = Image.new("RGB", (width, height))
    left = decode_image(encoded(picture, "JPEG"), SETTINGS, side).size
    assert min(left) >= min(2 * side, width, height)
    if min(width, height) >= 32 * side:
        assert left == (-(-width // 8), -(-height // 8))
    assert decode_image(encoded(picture, "PNG"), SETTINGS, side).size == (width, height)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_rotated_picture_stands_upright(orientation: int) -> None:
    # Smooth, so that JPEG's losses stay small; its corners differ.
    wide = Image.linear_gradient("L").resize((96, 64))
    picture = Image.merge(
        "RGB", (wide, wide.rotate(180), wide.transpose(Image.Transpose.ROTATE_90).resize((96, 64)))
    )
    as_stored = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]
    stored = picture
    for step in as_stored:
        stored = stored.transpose(step)
    data = encoded(stored, "JPEG", quality=100, subsampling=0, exif=rotated_exif(orientation))
    upright = decode_image(data, SETTINGS)
    assert upright.size == picture.size
    assert upright.mode == "RGB"
    assert np.abs(np.asarray(upright, int) - np.asarray(picture, int)).max() < 8


@pytest.mark.parametrize("kind", list(ALL))
def test_raw_base64_and_data_uri_are_the_same_picture(kind: str) -> None:
    data = ALL[kind]()
    text = base64.b64encode(data)
    assert encoded_image(data) == data
    assert encoded_image(text) == data
    assert encoded_image(base64.encodebytes(data)) == data
    assert encoded_image(base64.encodebytes(data).replace(b"\n", b"\r\n")) == data
    assert encoded_image(base64.urlsafe_b64encode(data)) == data
    assert encoded_image(base64.urlsafe_b64encode(data).rstrip(b"=")) == data
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


def decode_all(items: list[bytes], settings: Settings = SETTINGS) -> list[Image.Image]:
    """The pictures of a turn, as the image encoder looks at them and refuses them."""
    images = []
    for number, item in enumerate(items, start=1):
        try:
            images.append(open_picture(item, settings).decode())
        except SessionError as error:
            raise numbered(error, number, len(items)) from error
    return images


def refusal(items: list[bytes], settings: Settings = SETTINGS) -> str:
    with pytest.raises(SessionError) as caught:
        decode_all(items, settings)
    assert caught.value.code is ErrorCode.INVALID_ARG
    assert len(caught.value.sentence) < 400
    return caught.value.sentence


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (b"", "image is empty; expected an encoded picture (PNG, JPEG, WEBP, GIF, BMP, TIFF, "),
        (b"\x00" * 100_000, "image is no picture: 100000 bytes that begin with '\\x00"),
        ("ein Bild, äh".encode(), "image is no picture"),
        (b"hello", "looks like base64 text but is not"),
        (b"aGVsbG8=", "image is no picture: 5 bytes that begin with 'hello'"),
        (b"data:image/png,abc", "data URI that begins with 'data:image/png,a' ...; it must be"),
        (b"data:image/png;base64", "data URI that begins with"),
        (b"data:image/png;base64,@@@@", "looks like base64 text but is not"),
        (b"iVBORw0KGgo=iVBORw0KGgo=", "looks like base64 text but is not"),
        (b"====", "looks like base64 text but is not"),
        (b"data:image/png;base64,", "image is no picture: 0 bytes"),
        (b"II*\x00" + bytes(200), "image is"),
        (b"%PDF-1.7 ...", "image is a PDF file, which is not decoded here; send it as JPEG or PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image is a SVG file"),
        (b"\0\0\0\x18ftypisom\0\0\2\0isommp41", "image is a video or other ISO media file"),
        (b"\xff\x0a" + bytes(50), "image is a JPEG XL file"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "image is"),
        (b"https://example.com/cat.png", "image is a URL ('https://example.' ...), which the"),
        (b"S3://bucket/cat.png", "image is a URL"),
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
    "kind", [kind for kind in ALL if kind not in ("3 pixels high", "1 pixel", "tall")]
)
def test_a_file_cut_anywhere_is_refused_unless_every_pixel_is_there(kind: str) -> None:
    data = ALL[kind]()
    whole = np.asarray(decode_image(data, SETTINGS))
    near_the_end = range(max(0, len(data) - 40), len(data))
    for length in [*range(0, len(data), max(1, len(data) // 60)), *near_the_end]:
        try:
            [image] = decode_all([data[:length]])
        except SessionError:
            continue
        # Only what follows the pixels is missing: checksums, padding, an animation's other frames.
        np.testing.assert_array_equal(np.asarray(image), whole)
        assert length > len(data) - 40 or "animated" in kind or "several" in kind


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "JPEG, progressive", "JPEG, CMYK", "WebP", "BMP"])
def test_a_truncated_file_is_called_cut_off(kind: str) -> None:
    data = ALL[kind]()
    assert "damaged or cut off" in refusal([data[: len(data) * 9 // 10]])


@given(kind=st.sampled_from(list(ALL)), flips=st.integers(1, 30), seed=st.integers(0, 2**32 - 1))
def test_a_damaged_file_is_decoded_or_refused(kind: str, flips: int, seed: int) -> None:
    data, chance = bytearray(ALL[kind]()), random.Random(seed)
    for _ in range(flips):
        data[chance.randrange(len(data))] = chance.randrange(256)
    try:
        [image] = decode_all([bytes(data)], Settings(max_image_pixels=10**6))
    except SessionError:
        refusal([bytes(data)], Settings(max_image_pixels=10**6))
    else:
        assert image.mode == "RGB"


@given(
    beginning=st.sampled_from(
        [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"data:"]
    ),
    rest=st.binary(max_size=200),
)
def test_any_bytes_are_refused_in_a_sentence(beginning: bytes, rest: bytes) -> None:
    refusal([beginning + rest])


@given(st.text("aZ09+/-_= \n", max_size=40).filter(lambda text: text))
def test_any_text_like_base64_is_refused_in_a_sentence(text: str) -> None:
    refusal([text.encode()])
