"""From a video as it was sent to the pixel values of its frames, and what is no video."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from llava_triton.checkpoint.video_processor import VideoProcessor, load_video_processor
from llava_triton.checkpoint.weights import CheckpointError
from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.contract.models import VIDEO
from llava_triton.contract.settings import Settings
from llava_triton.pictures.assembly import PictureAssembly
from llava_triton.pictures.frame_pixels import FramePixels
from llava_triton.pictures.video_decoder import VideoDecoder
from llava_triton.pictures.videos import is_video, turn_items, video_of
from tests import clips
from tests.checkpoints import tiny_llava

SETTINGS = Settings()
MP4 = clips.clip(clips.shades(20))
GIF = clips.clip(clips.shades(3), "gif")


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def decoder() -> Iterator[VideoDecoder]:
    decoder = VideoDecoder(SETTINGS)
    yield decoder
    decoder.close()


def shown(decoder: VideoDecoder, file: bytes, frames: int = 8) -> list[int]:
    """The shade of each frame, rounded to what `clips.shades` makes."""
    return [round(each / 10) for each in decoder.frames(file, frames, lambda frame: frame.mean())]


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(SessionError) as caught:
        call()
    assert caught.value.code is ErrorCode.INVALID_ARG
    assert caught.value.subject == VIDEO.name
    return caught.value.sentence


# Files.


@pytest.mark.parametrize("container", clips.CODECS)
def test_frames_are_evenly_over_a_video(decoder: VideoDecoder, container: str) -> None:
    file = clips.clip(clips.shades(20), container)
    assert shown(decoder, file) == [0, 2, 5, 7, 10, 12, 15, 17]
    assert shown(decoder, file, 20) == list(range(20))
    assert shown(decoder, file, 64) == list(range(20))
    assert shown(decoder, file, 1) == [0]


def test_frames_are_counted_where_they_come_at_uneven_times(decoder: VideoDecoder) -> None:
    times = [0, 0.1, 0.2, 1, 2, 3, 3.1, 3.2, 3.3, 9]
    for container in ("mp4", "webm"):
        file = clips.clip(clips.shades(10), container, times=times)
        assert shown(decoder, file, 5) == [0, 2, 4, 6, 8]


def test_frames_are_those_that_transformers_reads(decoder: VideoDecoder) -> None:
    """As its `read_video_pyav` does, whose own number of frames is the header's."""
    file = clips.clip(clips.noise(9))
    with av.open(io.BytesIO(file), "r") as container:
        assert container.streams.video[0].frames == 9
        frames = [each.to_ndarray(format="rgb24") for each in container.decode(video=0)]
    indices = default_sample_indices_fn(VideoMetadata(total_num_frames=9), num_frames=4)
    seen = decoder.frames(file, 4, np.copy)
    np.testing.assert_array_equal(seen, [frames[index] for index in indices])


def test_what_is_transparent_is_white(decoder: VideoDecoder) -> None:
    file = io.BytesIO()
    pictures = [Image.new("RGBA", (16, 16), (0, 0, 0, 0)), Image.new("RGBA", (16, 16), "red")]
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], disposal=2)
    first, second = decoder.frames(file.getvalue(), 2, np.copy)
    assert (first == 255).all()
    assert (second == (255, 0, 0)).all()


def test_a_turned_video_is_seen_upright(decoder: VideoDecoder) -> None:
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[:, 32:] = 255
    (seen,) = decoder.frames(clips.turned(clips.clip([frame])), 1, np.copy)
    assert seen.shape == (64, 48, 3)
    assert seen[:28].max() < 32
    assert seen[36:].min() > 224


HOSTILE = {
    "half a file": (MP4[: len(MP4) // 2], "is damaged or cut off"),
    "without its end": (MP4[:-100], "has no frames"),
    "sound alone": (clips.sound(), "has no video stream, only audio ones"),
    "a billion frames in the header": (
        clips.with_frames_in_header(MP4, 10**9),
        "is damaged or cut off",
    ),
    "no frames in the header": (clips.with_frames_in_header(MP4, 0), "has no frames"),
    "16k x 16k": (
        clips.with_large_frames(clips.clip(clips.shades(2), "vp8"), 16_000, 16_000),
        "has frames of 16000 x 16000 pixels; the limit is 9437184",
    ),
    "a GIF of 65535 x 65535": (
        GIF[:6] + b"\xff\xff\xff\xff" + GIF[10:],
        "is damaged or cut off (Invalid argument)",
    ),
    "an hour long": (
        clips.clip(clips.shades(3), times=[0, 1, 4000]),
        "is 4000 s long; the limit is 300 s",
    ),
    "an MP4 by its first bytes only": (
        b"\0\0\0\x20ftypisom and then it goes on as a text",
        "is damaged or cut off",
    ),
    "a WebM by its first bytes only": (b"\x1a\x45\xdf\xa3" + b"text " * 50, "is damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_video_costs_itself(decoder: VideoDecoder, name: str) -> None:
    file, said = HOSTILE[name]
    assert refused(lambda: decoder.frames(file, 8, np.copy)).startswith(said)
    assert shown(decoder, MP4, 2) == [0, 10]


def test_a_list_of_other_files_is_not_followed(decoder: VideoDecoder, tmp_path: Path) -> None:
    """HLS and its like name files to open."""
    (tmp_path / "secret.mp4").write_bytes(MP4)
    playlist = f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/secret.mp4\n".encode()
    assert "is no video" in refused(lambda: video_of(VIDEO_ITEM + playlist, SETTINGS))
    concatenated = f"ffconcat version 1.0\nfile {tmp_path}/secret.mp4\n".encode()
    assert "is no video" in refused(lambda: video_of(VIDEO_ITEM + concatenated, SETTINGS))


VIDEO_ITEM = b"data:video/mp4,"


@pytest.mark.parametrize("seen", [MP4, GIF])
def test_a_decoder_that_takes_too_long_is_ended(seen: bytes) -> None:
    narrow = replace(SETTINGS, max_video_decode_seconds=0.2)
    decoder = VideoDecoder(narrow, child=("-c", "import time; time.sleep(1000)"))
    for _ in range(2):
        said = refused(lambda: decoder.frames(seen, 8, np.copy))
        assert said.startswith("takes longer than 0 s to decode")
        assert decoder.pid is None


def test_a_decoder_that_dies_is_replaced() -> None:
    decoder = VideoDecoder(SETTINGS)
    assert shown(decoder, MP4, 1) == [0]
    assert decoder.pid is not None
    os.kill(decoder.pid, signal.SIGKILL)
    assert "ended its decoder" in refused(lambda: decoder.frames(MP4, 1, np.copy))
    assert shown(decoder, MP4, 1) == [0]
    decoder.close()


def test_a_decoder_knows_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "of the server's")
    decoder = VideoDecoder(SETTINGS)
    assert shown(decoder, MP4, 1) == [0]
    environment = Path(f"/proc/{decoder.pid}/environ").read_bytes()
    assert b"PATH=" in environment
    assert b"A_SECRET" not in environment
    decoder.close()


def test_what_fails_with_a_frame_leaves_nothing_in_the_way(decoder: VideoDecoder) -> None:
    with pytest.raises(ZeroDivisionError):
        decoder.frames(MP4, 8, lambda frame: 1 / 0)
    assert shown(decoder, MP4, 2) == [0, 10]


# Ways to send them.


def test_what_is_a_video() -> None:
    assert is_video(MP4)
    assert is_video(clips.clip(clips.shades(1), "webm"))
    assert is_video(b"DATA:video/gif;base64,R0lG")
    assert is_video(b"\0\0\0\x08wide\0\0\0\x08mdat")
    for picture in (GIF, png(clips.noise(1)[0]), base64.b64encode(MP4), b"", b"text", b"QkAAfree"):
        assert not is_video(picture)


def test_a_file_may_come_in_base64_or_as_a_data_uri() -> None:
    text = base64.b64encode(MP4)
    for element in (MP4, text, b"data:video/mp4;base64," + text, b"data:video/mp4," + MP4):
        (item,) = turn_items([], [element], SETTINGS)
        assert is_video(item)
        video = video_of(item, SETTINGS)
        assert (video.file, video.frames, video.num_frames) == (MP4, (), None)
    recorded = b"data:video/webm;codecs=vp8,opus;base64," + text
    assert video_of(recorded, SETTINGS).file == MP4
    (item,) = turn_items([], [GIF], SETTINGS)
    assert video_of(item, SETTINGS).file == GIF


def test_a_client_may_say_how_many_frames() -> None:
    assert video_of(b"data:video/mp4;num_frames=4," + MP4, SETTINGS).num_frames == 4
    item = b"data:video/mp4;num_frames=64;base64," + base64.b64encode(MP4)
    assert video_of(item, SETTINGS).num_frames == 64


@pytest.mark.parametrize("number", [b"0", b"65", b"-1", b"x", b"", b"9" * 100])
def test_a_number_of_frames_that_is_none(number: bytes) -> None:
    item = b"data:video/mp4;num_frames=" + number + b"," + MP4
    said = refused(lambda: video_of(item, SETTINGS))
    assert "num_frames is a whole number from 1 to 64" in said


def test_frames_may_come_themselves() -> None:
    frames = [png(each) for each in clips.noise(3)]
    (item,) = turn_items([], frames, SETTINGS)
    assert is_video(item)
    assert video_of(item, SETTINGS).frames == tuple(frames)
    texts = [base64.b64encode(each) for each in frames]
    (item,) = turn_items([], texts, SETTINGS)
    assert video_of(item, SETTINGS).frames == tuple(texts)
    said = b"data:video/jpeg;base64," + b",".join(texts)
    assert video_of(said, SETTINGS).frames == tuple(texts)


def test_many_frames_are_not_even_taken_apart() -> None:
    commas = b"data:video/jpeg;base64," + b"," * 10_000_000
    assert len(video_of(commas, SETTINGS).frames) == SETTINGS.max_video_frames + 1
    joined = b"data:video/x-frames," + b"\0" * 10_000_000
    assert len(video_of(joined, SETTINGS).frames) == SETTINGS.max_video_frames + 1
    narrow = replace(SETTINGS, max_video_bytes=100)
    said = refused(lambda: turn_items([], [png(clips.noise(1)[0])] * 2, narrow))
    assert "bytes of frames; the limit is 100" in said


def test_videos_are_behind_pictures() -> None:
    picture = png(clips.noise(1)[0])
    items = turn_items([picture, MP4], [GIF, MP4], SETTINGS)
    assert items[:2] == [picture, MP4]
    assert [video_of(each, SETTINGS).file for each in items[2:]] == [GIF, MP4]
    with pytest.raises(SessionError, match="a turn takes at most 3"):
        turn_items([picture, MP4], [GIF, MP4], replace(SETTINGS, max_images_per_turn=3))
    said = refused(lambda: turn_items([], [picture, MP4], SETTINGS))
    assert "pictures and video files" in said


@pytest.mark.parametrize(
    ("element", "said"),
    [
        (b"", "is empty"),
        (b"This is a text, whatever its name.mp4", "is no video that is decoded here"),
        (b"%PDF-1.7", "a PDF file"),
        (b"data:video/mp4", "is a data URI that begins with"),
        (b"data:video/mp4;base64,AAA*", "is no base64 text"),
        (b"RIFF\0\0\0\0AVI LIST", "is no video that is decoded here"),
    ],
)
def test_what_is_no_video(element: bytes, said: str) -> None:
    def look() -> None:
        (item,) = turn_items([], [element], SETTINGS)
        video_of(item, SETTINGS)

    assert said in refused(look)


def test_a_long_file_is_refused() -> None:
    narrow = replace(SETTINGS, max_video_bytes=len(MP4) - 1)
    assert f"is {len(MP4)} bytes long" in refused(lambda: video_of(MP4, narrow))
    text = b"data:video/mp4;base64," + base64.b64encode(MP4)
    assert "bytes long" in refused(lambda: video_of(text, narrow))


# Pixel values.


ONEVISION = VideoProcessor(
    None, (56, 56), "bicubic", None, 1 / 255, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), None
)
NEXT = replace(ONEVISION, shortest_edge=56, size=None, crop=(56, 56))
SMALL = replace(NEXT, shortest_edge=40, crop=(57, 57))
MADE = {
    # By transformers 5.23 and torchvision 0.28: of values that are evenly over a tile.
    "ONEVISION 48x64": (
        ONEVISION,
        (48, 64),
        [
            -2.5,
            0.26471,
            -1.97059,
            0.81373,
            -1.0719,
            0.19608,
            0.95425,
            0.53595,
            -0.11275,
            0.08333,
            0.26961,
            0.80882,
        ],
    ),
    "ONEVISION 56x56": (
        ONEVISION,
        (56, 56),
        [
            -2.5,
            0.44118,
            -1.63725,
            1.30392,
            -1.0719,
            0.28758,
            1.29412,
            1.22876,
            -0.52451,
            1.52451,
            1.06373,
            0.90686,
        ],
    ),
    "ONEVISION 120x90": (
        ONEVISION,
        (120, 90),
        [
            -2.40196,
            -1.59804,
            -0.77451,
            0.02941,
            -0.33987,
            -0.66667,
            0.79739,
            0.31373,
            1.33824,
            1.03431,
            0.81863,
            1.10294,
        ],
    ),
    "ONEVISION 9x31": (
        ONEVISION,
        (9, 31),
        [
            -2.5,
            -1.7549,
            -0.93137,
            -0.10784,
            -1.32026,
            -0.95425,
            -0.02614,
            1.43791,
            0.70098,
            0.71078,
            0.72059,
            0.86765,
        ],
    ),
    "NEXT 48x64": (
        NEXT,
        (48, 64),
        [
            -2.04902,
            0.46078,
            -2.0098,
            0.51961,
            -0.71895,
            0.71895,
            0.14379,
            0.39216,
            1.61275,
            0.37745,
            0.72059,
            0.9951,
        ],
    ),
    "NEXT 56x56": (
        NEXT,
        (56, 56),
        [
            -2.5,
            0.44118,
            -1.63725,
            1.30392,
            -1.0719,
            0.28758,
            1.29412,
            1.22876,
            -0.52451,
            1.52451,
            1.06373,
            0.90686,
        ],
    ),
    "NEXT 120x90": (
        NEXT,
        (120, 90),
        [
            -0.44118,
            -0.69608,
            -0.95098,
            -1.22549,
            0.69281,
            1.00654,
            0.37908,
            -0.30065,
            1.33824,
            1.03431,
            0.81863,
            1.10294,
        ],
    ),
    "NEXT 9x31": (
        NEXT,
        (9, 31),
        [
            -1.89216,
            -1.46078,
            -0.9902,
            -0.51961,
            -1.29412,
            -0.8366,
            -0.23529,
            0.53595,
            0.38725,
            1.12255,
            -0.39706,
            0.14216,
        ],
    ),
    "SMALL 48x64": (
        SMALL,
        (48, 64),
        [
            -2.5,
            0.73529,
            1.51961,
            1.16667,
            -1.33333,
            0.96732,
            -0.26144,
            -1.33333,
            0.86765,
            -0.31863,
            0.19118,
            -0.75,
        ],
    ),
    "SMALL 56x56": (
        SMALL,
        (56, 56),
        [
            -2.5,
            0.77451,
            -2.5,
            2.12745,
            -1.33333,
            -0.60131,
            0.47059,
            -1.33333,
            -0.2402,
            -0.75,
            1.16176,
            -0.75,
        ],
    ),
    "SMALL 120x90": (
        SMALL,
        (120, 90),
        [
            -2.5,
            -0.32353,
            -2.5,
            -0.04902,
            -0.8366,
            0.03922,
            0.39216,
            0.36601,
            0.06373,
            -0.75,
            1.12255,
            -0.75,
        ],
    ),
    "SMALL 9x31": (
        SMALL,
        (9, 31),
        [
            -2.5,
            -1.42157,
            -1.26471,
            -0.42157,
            -1.33333,
            -0.78431,
            -0.40523,
            -1.33333,
            0.75,
            0.36765,
            1.09314,
            -0.75,
        ],
    ),
}


def ramp(height: int, width: int) -> np.ndarray:
    """A frame of slopes and edges."""
    rows, columns = np.mgrid[:height, :width]
    slopes: np.ndarray = np.stack([rows * 7 + columns * 3, rows * columns, columns * 31], -1)
    return slopes.astype(np.uint8)


@pytest.mark.parametrize("name", MADE)
def test_pixel_values_are_those_of_transformers(name: str) -> None:
    processor, size, expected = MADE[name]
    tile = FramePixels(processor).tile(ramp(*size))
    places = np.linspace(0, tile.size - 1, len(expected)).astype(int)
    np.testing.assert_allclose(tile.ravel()[places], expected, atol=1e-5)


def test_pixel_values_are_nearly_those_of_pictures() -> None:
    """The two ways of scaling round differently; a picture's is Pillow's."""
    like = CLIPImageProcessorPil(
        size={"shortest_edge": 56},
        crop_size={"height": 56, "width": 56},
        image_mean=list(NEXT.mean),
        image_std=list(NEXT.std),
    )
    for size in ((48, 64), (200, 120), (57, 56)):
        frame = ramp(*size)
        expected = like(Image.fromarray(frame), return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(FramePixels(NEXT).tile(frame), expected, atol=1.5 / 255 / 0.2)


# Processors.


@pytest.fixture(scope="module", params=["llava_onevision", "llava_next_video"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    vision = "siglip" if request.param == "llava_onevision" else "clip"
    folder = tmp_path_factory.mktemp(request.param)
    return tiny_llava(folder / "checkpoint", family=request.param, vision=vision)


def test_a_processor_is_read_wherever_it_is(checkpoint: Path, tmp_path: Path) -> None:
    processor = load_video_processor(checkpoint)
    assert processor.output == (56, 56)
    processor.save(tmp_path)
    assert load_video_processor(tmp_path) == processor
    own = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"video_processor": own | {"num_frames": 5}})
    )
    assert load_video_processor(tmp_path).num_frames == 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"resample": 1}, "its resample is 1"),
        ({"do_rescale": False}, "its do_rescale is false"),
        ({"size": {"longest_edge": 7}}, "a size is"),
        ({"size": None}, "has no usable video processor"),
    ],
)
def test_a_processor_that_is_not_followed(
    checkpoint: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    load_video_processor(checkpoint).save(tmp_path)
    file = tmp_path / "video_preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=said):
        load_video_processor(tmp_path)


# All of it, up to the vision encoder.


def test_a_video_as_its_family_sees_it(checkpoint: Path) -> None:
    assembly = PictureAssembly(checkpoint, checkpoint, replace(SETTINGS, video_frames=4))
    try:
        one = assembly.look(MP4).decode()
        assert one.pixels.shape == (4, 3, 56, 56)
        (item,) = turn_items([], [b"data:video/mp4;num_frames=2," + MP4], SETTINGS)
        assert len(assembly.look(item).decode().pixels) == 2
        frames = clips.noise(3)
        (item,) = turn_items([], [png(each) for each in frames], SETTINGS)
        pixels = FramePixels(load_video_processor(checkpoint))
        np.testing.assert_array_equal(
            assembly.look(item).decode().pixels,
            np.concatenate([pixels.tile(each) for each in frames]),
        )
        few = replace(SETTINGS, max_video_frames=2)
        fewer = PictureAssembly(checkpoint, checkpoint, few)
        assert "has more than 2 frames" in refused(lambda: fewer.look(item))
        narrow = PictureAssembly(
            checkpoint, checkpoint, replace(SETTINGS, max_video_pixels=64 * 48 - 1)
        )
        assert "has a frame 1 that has 64 x 48" in refused(lambda: narrow.look(item))
        (item,) = turn_items([], [png(frames[0]), png(frames[0])[:50]], SETTINGS)
        said = refused(lambda: assembly.look(item).decode())
        assert said.startswith("has a frame 2 that is damaged or cut off")
    finally:
        assembly.close()


def test_a_video_is_shown_again_as_it_was_whatever_the_settings_are(checkpoint: Path) -> None:
    """The journal has it as it was sent."""
    frames = [png(each) for each in clips.noise(3)]
    sent = [
        *turn_items([], [MP4, b"data:video/*;num_frames=2," + MP4], SETTINGS),
        *turn_items([], [b"data:video/mp4;base64," + base64.b64encode(MP4)], SETTINGS),
        *turn_items([], frames, SETTINGS),
        b"data:video/png;base64," + b",".join(map(base64.b64encode, frames)),
        frames[0],  # a picture
    ]
    then, now = (
        PictureAssembly(checkpoint, checkpoint, replace(SETTINGS, video_frames=number))
        for number in (3, 4)
    )
    try:
        kept = [then.as_shown(item) for item in sent]
        kept = [now.as_shown(item) for item in kept]  # brought back, and kept again
        for before, after in zip(sent, kept, strict=True):
            np.testing.assert_array_equal(
                then.look(before).decode().pixels, now.look(after).decode().pixels
            )
    finally:
        then.close()
        now.close()


def test_a_family_that_knows_no_videos_says_so(tmp_path: Path) -> None:
    checkpoint = tiny_llava(tmp_path / "checkpoint")
    assembly = PictureAssembly(checkpoint, checkpoint, SETTINGS)
    said = refused(lambda: assembly.look(MP4))
    assert "this checkpoint (llava) has not learned to see videos; send some of its frames" in said
