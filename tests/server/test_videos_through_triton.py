"""Videos through the real server: whole conversations token for token those of transformers, and
what is no video."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http
import tritonclient.utils
from PIL import Image

from llava_triton.checkpoint.configuration import llava_config
from llava_triton.checkpoint.families import family_of
from llava_triton.client import AsyncSession, Session
from llava_triton.contract.settings import Settings
from llava_triton.pictures.video_decoder import VideoDecoder
from llava_triton.server.triton_server import TritonServer, free_ports
from tests import clips
from tests.adapter_process import Adapter
from tests.checkpoints import tiny_llava
from tests.reference import TransformersChat
from tests.triton import Answer, ask
from tests.unit.test_videos import HOSTILE

QUESTIONS = (
    "How many shapes are there?",
    "Describe the picture.",
    "Is there a red circle?",
    "And what about it?",
)
SHAPES: dict[str, dict[str, Any]] = {
    "OneVision": {
        "family": "llava_onevision",
        "vision": "siglip",
        "text": "qwen2",
        "kv_heads": 1,
        "seed": 2,
    },
    "NeXT-Video": {"family": "llava_next_video", "kv_heads": 2, "seed": 3},
}
FRAMES = 16
"""Of a video, where nobody says how many."""


@dataclass(frozen=True)
class Stand:
    """A server, and what its answers are compared with."""

    server: TritonServer
    repository: Path
    client: Any
    reference: TransformersChat
    family: Any

    def ask(self, text: str | None = None, *, session: str, **turn: Any) -> Answer:
        return ask(self.client, text, session=session, parameters={"max_tokens": 32}, **turn)

    def tiles(self) -> int:
        """That the vision encoder has encoded."""
        found = self.client.get_inference_statistics("vision_encoder")["model_stats"][0]
        return int(found["inference_count"])


@pytest.fixture(scope="module", params=SHAPES)
def stand(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stand]:
    folder = tmp_path_factory.mktemp("videos")
    checkpoint = tiny_llava(folder / "checkpoint", **SHAPES[request.param])
    repository = folder / "repository"
    subprocess.run(
        [sys.executable, "-m", "llava_export", "--model", checkpoint, "--output", repository],
        check=True,
    )
    with (
        TritonServer(repository, *free_ports(3)) as server,
        tritonclient.http.InferenceServerClient(server.http_address) as client,
    ):
        family = family_of(llava_config(checkpoint))
        yield Stand(server, repository, client, TransformersChat(checkpoint), family)


@pytest.fixture(scope="module")
def decoder() -> Iterator[VideoDecoder]:
    decoder = VideoDecoder(Settings())
    yield decoder
    decoder.close()


def picture(width: int = 90, height: int = 60) -> bytes:
    (frame,) = clips.noise(1, width, height)
    return png(frame)


def png(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return file.getvalue()


def load(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file)).convert("RGB")


@pytest.mark.parametrize("container", ["mp4", "webm", "gif"])
def test_a_conversation_about_a_video_and_a_picture(
    stand: Stand, decoder: VideoDecoder, container: str
) -> None:
    file = clips.clip(clips.noise(20, 64, 48 + 2 * len(container)), container)
    frames = decoder.frames(file, FRAMES, np.copy)
    stand.reference.restart()
    session, seen, before = uuid.uuid4().hex, 0, stand.tiles()
    for number, question in enumerate(QUESTIONS):
        images = [picture()] if number == 2 else []
        videos = [file] if number == 0 else []
        expected = stand.reference.answer(
            question, [load(each) for each in images], videos=[frames] if videos else ()
        )
        answer = stand.ask(
            question,
            session=session,
            start=number == 0,
            images=images or None,
            videos=videos or None,
        )
        assert answer.text == expected
        assert answer.num_input_tokens + answer.num_output_tokens == stand.reference.num_tokens
        # The answer's last token was said and not computed with.
        assert answer.num_cached_tokens >= seen - 1
        seen = stand.reference.num_tokens
    tiles = FRAMES + stand.family.num_tiles(60, 90)
    if container == "mp4":
        assert stand.tiles() == before + tiles
    # Another session, and nothing is encoded again.
    before = stand.tiles()
    again = stand.ask(QUESTIONS[0], session=uuid.uuid4().hex, start=True, end=True, videos=[file])
    assert stand.tiles() == before
    assert again.num_cached_tokens > 0


def test_a_session_with_a_video_is_resumed_where_videos_are_shown_otherwise(
    stand: Stand, tmp_path: Path
) -> None:
    file = clips.clip(clips.noise(24))
    expected = [
        stand.ask(QUESTIONS[0], session="a video", start=True, videos=[file]).text,
        stand.ask(QUESTIONS[1], session="a video", end=True).text,
    ]
    repository, folder = tmp_path / "repository", tmp_path / "a journal"
    shutil.copytree(stand.repository, repository, symlinks=True)
    said: list[str] = []
    for number in (FRAMES, FRAMES // 2):
        settings = {"journal": folder.as_uri(), "video_frames": number}
        (repository / "settings.json").write_text(json.dumps(settings))
        with TritonServer(repository, *free_ports(3)) as server:
            if not said:
                with tritonclient.http.InferenceServerClient(server.http_address) as client:
                    asked = ask(
                        client,
                        QUESTIONS[0],
                        session="a video",
                        start=True,
                        videos=[file],
                        parameters={"max_tokens": 32},
                    )
                said.append(asked.text)
                until = time.monotonic() + 60.0
                while not list(folder.glob("*/records/*")):
                    assert time.monotonic() < until, "the turn was not written"
                    time.sleep(0.02)
            else:
                with Session.open(server.grpc_url, resume="a video") as session:
                    said.append(session.ask(QUESTIONS[1], max_tokens=32).text)
    assert said == expected


def test_frames_are_added_turn_by_turn(stand: Stand) -> None:
    """A camera: each frame adds its own tokens, and nothing before is computed again."""
    stand.reference.restart()
    session, tokens, start = uuid.uuid4().hex, 0, True
    frames = clips.noise(6, 70, 50)
    before = stand.tiles()
    for number, frame in enumerate(frames):
        answer = stand.ask(session=session, start=start, videos=[png(frame)])
        assert answer.finish_reason == "prefilled"
        added = answer.num_input_tokens - tokens
        assert answer.num_cached_tokens >= tokens - 1
        assert added >= stand.family.num_video_tokens(1, tile_tokens(stand))
        start, tokens = False, answer.num_input_tokens
        assert stand.tiles() == before + number + 1
    answer = stand.ask(QUESTIONS[0], session=session)
    shown = [[each] for each in frames]
    assert answer.text == stand.reference.answer(QUESTIONS[0], videos=shown)
    assert answer.num_cached_tokens >= tokens - 1
    seen = stand.reference.num_tokens
    assert stand.ask(session=session, videos=[png(frames[0])]).num_cached_tokens >= seen - 1
    answer = stand.ask(QUESTIONS[1], session=session)
    assert answer.text == stand.reference.answer(QUESTIONS[1], videos=[shown[0]])
    assert stand.tiles() == before + len(frames)


def tile_tokens(stand: Stand) -> int:
    metadata = stand.client.get_model_metadata("vision_encoder")
    return int(metadata["outputs"][0]["shape"][1])


def test_pictures_are_before_videos_and_both_where_the_client_puts_them(stand: Stand) -> None:
    image, frames = picture(), clips.noise(3)
    elements = [png(each) for each in frames]
    for positions in (None, [4, 9], [0, 26]):
        stand.reference.restart()
        expected = stand.reference.answer(
            QUESTIONS[0], [load(image)], positions=positions, videos=[frames]
        )
        answer = stand.ask(
            QUESTIONS[0],
            session=uuid.uuid4().hex,
            start=True,
            end=True,
            images=[image],
            videos=elements,
            positions=positions,
        )
        assert answer.text == expected


def test_a_video_may_stand_among_pictures_and_in_a_history(
    stand: Stand, decoder: VideoDecoder
) -> None:
    file = clips.clip(clips.noise(8), "webm")
    frames = decoder.frames(file, 4, np.copy)
    marked = b"data:video/webm;num_frames=4," + file
    stand.reference.restart()
    stand.reference.say(QUESTIONS[0], answer="two red stars", videos=[frames])
    expected = stand.reference.answer(QUESTIONS[1])
    answer = stand.ask(
        QUESTIONS[1],
        session=uuid.uuid4().hex,
        start=True,
        end=True,
        images=[marked],
        history=[{"text": QUESTIONS[0], "answer": "two red stars", "images": 1}],
    )
    assert answer.text == expected


def test_what_is_no_video_costs_its_own_turn_only(stand: Stand) -> None:
    stand.reference.restart()
    session = uuid.uuid4().hex
    expected = stand.reference.answer(QUESTIONS[0], [load(picture())])
    answer = stand.ask(QUESTIONS[0], session=session, start=True, images=[picture()])
    assert answer.text == expected
    hostile: dict[str, tuple[bytes, str]] = HOSTILE | {
        "a text": (b"This is a text, whatever its name.mp4", "is no video"),
        "nothing": (b"data:video/mp4,", "is empty"),
    }
    for file, said in hostile.values():
        with pytest.raises(tritonclient.utils.InferenceServerException) as caught:
            stand.ask("What is this?", session=session, videos=[file])
        assert f"INVALID_ARG: video {said}" in str(caught.value)
    second = stand.ask(QUESTIONS[1], session=session)
    assert second.text == stand.reference.answer(QUESTIONS[1])


def test_of_several_one_is_named(stand: Stand) -> None:
    def refuse(videos: Sequence[bytes]) -> str:
        with pytest.raises(tritonclient.utils.InferenceServerException) as caught:
            stand.ask("?", session=uuid.uuid4().hex, start=True, images=[picture()], videos=videos)
        return str(caught.value)

    assert "video 3 of 3 has no video stream" in refuse([clips.clip(clips.noise(2)), clips.sound()])
    long = clips.clip(clips.noise(64))
    many = [b"data:video/mp4;num_frames=64," + long] * 5
    assert "tokens and the model's context is 1024" in refuse(many)


# Through the client and the adapter.


@pytest.fixture(scope="module")
def adapter(stand: Stand) -> Iterator[Adapter]:
    adapter = Adapter(stand.server, stand.repository)
    try:
        adapter.wait_until(lambda: adapter.ping() == 200)
        yield adapter
    finally:
        adapter.stop()


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_the_client_shows_videos(
    stand: Stand, decoder: VideoDecoder, scheme: str, tmp_path: Path
) -> None:
    place = stand.server.grpc_address if scheme == "grpc" else stand.server.http_address
    file = clips.clip(clips.noise(9), "gif")
    (tmp_path / "clip.gif").write_bytes(file)
    frames = clips.noise(2, 40, 50)
    limit: dict[str, Any] = {"max_tokens": 32}
    stand.reference.restart()
    with Session.open(f"{scheme}://{place}", video=tmp_path / "clip.gif", num_frames=2) as session:
        shown = decoder.frames(file, 2, np.copy)
        expected = stand.reference.answer(QUESTIONS[0], videos=[shown])
        assert session.ask(QUESTIONS[0], **limit).text == expected
        session.add_video([Image.fromarray(each) for each in frames])
        expected = stand.reference.answer(QUESTIONS[1], videos=[frames])
        assert session.ask(QUESTIONS[1], **limit).text == expected
        expected = stand.reference.answer(
            QUESTIONS[2], [load(picture())], positions=[5, 9], videos=[frames]
        )
        found = session.ask(
            QUESTIONS[2],
            image=picture(),
            video=[png(each) for each in frames],
            image_positions=[5, 9],
            **limit,
        )
        assert found.text == expected


def test_the_asyncio_client_shows_videos(stand: Stand) -> None:
    frames = [png(each) for each in clips.noise(2, 40, 50)]

    async def answers() -> list[str]:
        url = f"grpc://{stand.server.grpc_address}"
        async with await AsyncSession.open(url, video=frames) as session:
            first = await session.ask(QUESTIONS[0], max_tokens=32)
            await session.add_video(frames[::-1])
            return [first.text, (await session.ask(QUESTIONS[1], max_tokens=32)).text]

    stand.reference.restart()
    shown = [np.array(load(each)) for each in frames]
    assert asyncio.run(answers()) == [
        stand.reference.answer(QUESTIONS[0], videos=[shown]),
        stand.reference.answer(QUESTIONS[1], videos=[shown[::-1]]),
    ]


def test_a_replay_shows_videos_where_they_were(stand: Stand, decoder: VideoDecoder) -> None:
    """With a video in the text, and a picture that came before, without one."""
    file, said = clips.clip(clips.noise(4)), "two red stars"
    stand.reference.restart()
    stand.reference.say(
        QUESTIONS[0],
        [load(picture())],
        answer=said,
        positions=[8],
        videos=[decoder.frames(file, 2, np.copy)],
    )
    url = f"grpc://{stand.server.grpc_address}"
    with Session.open(url, replay=True, image=picture()) as session:
        chosen: dict[str, Any] = {"structured_outputs": {"choice": [said]}}
        shown: dict[str, Any] = {"video": file, "num_frames": 2, "image_positions": [8]}
        assert session.ask(QUESTIONS[0], **shown, **chosen).text == said
        stand.client.infer("llava", [], sequence_id=session.id, sequence_end=True)
        expected = stand.reference.answer(QUESTIONS[1])
        assert session.ask(QUESTIONS[1], max_tokens=32).text == expected


def test_the_adapter_shows_videos(stand: Stand, decoder: VideoDecoder, adapter: Adapter) -> None:
    file = clips.clip(clips.noise(6), "gif")
    frames = decoder.frames(file, 3, np.copy)
    text = base64.b64encode(file).decode()

    def chat(*parts: Any, **fields: Any) -> Any:
        messages = [{"role": "user", "content": list(parts)}]
        answer = adapter.invoke({"messages": messages, "max_tokens": 32, **fields})
        assert answer.status == 200, answer.body
        return answer.json["choices"][0]["message"]["content"]

    def part(url: str) -> dict[str, Any]:
        return {"type": "video_url", "video_url": {"url": url}}

    question = {"type": "text", "text": QUESTIONS[0]}
    three = {"media_io_kwargs": {"video": {"num_frames": 3}}}
    stand.reference.restart()
    expected = stand.reference.answer(QUESTIONS[0], videos=[frames])
    for kind in ("video/gif", "image/gif"):
        assert chat(part(f"data:{kind};base64,{text}"), question, **three) == expected
    themselves = ",".join(base64.b64encode(png(each)).decode() for each in frames)
    assert chat(part(f"data:video/jpeg;base64,{themselves}"), question) == expected
    stand.reference.restart()
    expected = stand.reference.answer("Here it is.", positions=[5], videos=[frames])
    content = (
        {"type": "text", "text": "Here "},
        part(f"data:video/gif;base64,{text}"),
        {"type": "text", "text": "it is."},
    )
    assert chat(*content, **three) == expected
    asked = {"prompt": QUESTIONS[0], "video": text, "max_tokens": 32}
    stand.reference.restart()
    expected = stand.reference.answer(QUESTIONS[0], videos=[decoder.frames(file, 16, np.copy)])
    assert adapter.invoke(asked).json["choices"][0]["text"] == expected
    opened = adapter.invoke(file, "NEW_SESSION", "video/gif")
    assert opened.status == 200
    again = adapter.invoke({"prompt": QUESTIONS[0], "max_tokens": 32}, opened.new_session)
    assert again.json["choices"][0]["text"] == expected
    refused = adapter.invoke(b"a text", "NEW_SESSION", "video/mp4")
    assert (refused.status, refused.code) == (400, "video_invalid")
    assert "video is no video that is decoded here" in refused.json["error"]["message"]
