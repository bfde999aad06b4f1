"""The messages of a chat completion, as turns."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from typing import Any, Literal, NamedTuple

from llava_sagemaker.adapter.errors import AdapterError, invalid_request
from llava_sagemaker.adapter.json_body import LongString, beginning, too_long
from llava_sagemaker.adapter.pictures import Video
from llava_triton.contract.history import PastTurn
from llava_triton.contract.positions import Positions

Picture = str | LongString | Video
"""A data URI or a URL; of a video where it says so."""


@dataclass(frozen=True)
class _Said:
    """A user's message and what was answered."""

    text: str
    images: tuple[Picture, ...]
    positions: Positions
    answer: str


@dataclass(frozen=True)
class Conversation:
    """Messages that end with a question."""

    past: tuple[_Said, ...]
    text: str
    """The question."""
    images: tuple[Picture, ...]
    """The question's pictures."""
    positions: Positions
    """Where they stand in the question."""

    def all_images(self) -> list[Picture]:
        """The pictures of the past, in order, then the question's."""
        return [image for said in self.past for image in said.images] + list(self.images)

    def history(self) -> list[PastTurn]:
        """The past as the engine takes it."""
        return [
            PastTurn(_whole(said.text), _whole(said.answer), len(said.images), said.positions)
            for said in self.past
        ]

    @cached_property
    def picture_digests(self) -> tuple[bytes, ...]:
        """Of all pictures, in order."""
        return tuple(_extended(b"", [image]) for image in self.all_images())

    @property
    def question_digests(self) -> tuple[bytes, ...]:
        """Of the question's pictures."""
        return self.picture_digests[len(self.picture_digests) - len(self.images) :]

    @property
    def pictures(self) -> frozenset[bytes]:
        """The same, in no order."""
        return frozenset(self.picture_digests)

    def past_digest(self) -> bytes:
        """What the past is known by."""
        digest = NOTHING_SAID
        digests = iter(self.picture_digests)
        for said in self.past:
            shown = list(islice(digests, len(said.images)))
            digest = answered(_asked(digest, said.text, shown, said.positions), said.answer)
        return digest

    def asked_digest(self, before: bytes) -> bytes:
        """What a conversation is known by that was known by `before` and got the question."""
        return _asked(before, self.text, self.question_digests, self.positions)


def _whole(text: str) -> str:
    """Without halves of surrogate pairs, as a question loses them on its way."""
    return text.encode(errors="replace").decode()


NOTHING_SAID = b""
"""The digest of a conversation that has not begun."""


def answered(asked: bytes, answer: str) -> bytes:
    """The digest of a conversation whose last question got its answer."""
    return _extended(asked, [answer])


def _asked(before: bytes, text: str, pictures: Sequence[bytes], positions: Positions) -> bytes:
    places = [] if positions is None else [repr(positions)]
    return _extended(before, [text, *pictures, *places])


def _extended(digest: bytes, parts: Sequence[Picture | bytes]) -> bytes:
    grown = hashlib.sha256(digest)
    for part in parts:
        if isinstance(part, Video):
            grown.update(_extended(part.mark, [part.named]))
            continue
        if isinstance(part, LongString):
            pieces = part.pieces
        else:
            pieces = (part.encode(errors="replace") if isinstance(part, str) else part,)
        grown.update(sum(map(len, pieces)).to_bytes(8, "little"))
        for piece in pieces:
            grown.update(piece)
    return grown.digest()


NO_TEXT = " "
"""A question without words. (Of an empty one the models would only take the pictures.)"""


class _Message(NamedTuple):
    """A message, or several of one side."""

    side: Literal["user", "assistant"]
    text: str
    images: tuple[Picture, ...] = ()
    positions: Positions = None


def read_conversation(messages: Any, num_frames: int | None = None) -> Conversation:
    """Check a request's `messages`.

    Neighbouring messages of one side are joined by line breaks. What the system says is the user's
    to say: the models know no other place for it.

    Args:
        messages: of the request.
        num_frames: that are shown of each video.

    Raises:
        AdapterError: invalid_request, naming the message.
    """
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages must be a list with at least one message")
    said = [_message(number, each, num_frames) for number, each in enumerate(messages, 1)]
    while said and said[-1] == _Message("assistant", ""):
        said.pop()  # where some clients want the answer to be put
    sides = [_joined(list(run)) for _, run in groupby(said, key=lambda message: message.side)]
    if not sides or sides[-1].side == "assistant":
        raise _wrong("the last message must be the user's, the question to answer")
    if sides[0].side == "assistant":
        sides.insert(0, _Message("user", ""))  # a greeting, often
    question = sides.pop()
    if not question.text and not question.images:
        raise _wrong("the last message has neither text nor a picture; it is what is answered")
    pairs = zip(sides[::2], sides[1::2], strict=True)
    past = tuple(
        _Said(user.text or NO_TEXT, user.images, user.positions, reply.text)
        for user, reply in pairs
    )
    return Conversation(past, question.text or NO_TEXT, question.images, question.positions)


def _joined(messages: Sequence[_Message]) -> _Message:
    """Messages of one side as one. Where the pictures of one have places of their own, those of the
    others are before their texts."""
    text = "\n".join(message.text for message in messages if message.text)
    images = tuple(image for message in messages for image in message.images)
    if all(message.positions is None for message in messages):
        return _Message(messages[0].side, text, images)
    positions: list[int] = []
    start = 0
    for message in messages:
        own = message.positions or (0,) * len(message.images)
        positions += [start + position for position in own]
        start += len(message.text) + 1 if message.text else 0
    # A picture behind the last text, in a message without one.
    places = tuple(min(position, len(text)) for position in positions)
    return _Message(messages[0].side, text, images, places)


_SIDES: dict[Any, Literal["user", "assistant"]] = {
    "system": "user",
    "developer": "user",
    "user": "user",
    "assistant": "assistant",
}


def _message(number: int, message: Any, num_frames: int | None) -> _Message:
    name = f"message {number}"
    if not isinstance(message, dict):
        raise _wrong(f"{name} is no object with role and content")
    role = message.get("role")
    side = _SIDES.get(role) if isinstance(role, str) else None
    if side is None:
        raise _wrong(
            f"{name} has the role {str(role)[:80]!r}; it must be system, developer, user or "
            "assistant"
        )
    if message.get("tool_calls") or message.get("function_call"):
        raise _wrong(f"{name} calls tools, which is not supported")
    text = ""
    images: list[Picture] = []
    positions: list[int] = []
    before = ""
    for kind, value in _parts(name, message.get("content")):
        if kind != "text":
            images.append(value if kind == "image" else Video(value, num_frames))
            positions.append(len(text))
        elif isinstance(value, LongString):
            raise too_long(name, value)
        elif value:
            text += f"\n{value}" if before == "text" else value
        if value:
            before = kind
    if images and side == "assistant":
        raise _wrong(f"{name} is the assistant's and has a picture; only users show pictures")
    # All before the text or all behind it: where the chat template puts pictures. Checkpoints have
    # learned that place, and many clients put pictures last.
    between = set(positions) not in (set(), {0}, {len(text)})
    return _Message(side, text, tuple(images), tuple(positions) if between else None)


def _wrong(sentence: str) -> AdapterError:
    return invalid_request(sentence, "messages")


def _parts(
    name: str, content: Any
) -> Iterator[tuple[Literal["text", "image", "video"], str | LongString]]:
    """A message's content: text, pictures and videos, in order. Types are those of chat
    completions and of OpenAI's newer API, whose clients mix them; that of videos is vLLM's."""
    for part in content if isinstance(content, list) else [content]:
        if part is None or isinstance(part, str | LongString):
            yield "text", part or ""
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "input_text", "output_text", "refusal"):
            text = part.get("refusal" if kind == "refusal" else "text")
            if not isinstance(text, str | LongString | None):
                raise _wrong(f"the text of {name} must be a string")
            yield "text", text or ""
        elif kind in ("image_url", "input_image", "video_url", "input_video"):
            field: Literal["image", "video"] = "video" if "video" in kind else "image"
            image = part.get(f"{field}_url")
            url = image.get("url") if isinstance(image, dict) else image
            if not isinstance(url, str | LongString) or ":" not in beginning(url):
                raise AdapterError(
                    400,
                    f"{field}_invalid",
                    f"{name} has {'an' if field == 'image' else 'a'} {field}_url that is no URL; "
                    "give a data URI, an https:// or an s3:// URL",
                    "messages",
                )
            yield field, url
        elif isinstance(part, dict):
            raise _wrong(
                f"{name} has a part that is no text, image_url or video_url: {str(kind)[:80]!r}"
            )
        else:
            raise _wrong(f"the content of {name} must be a string or a list of parts")
