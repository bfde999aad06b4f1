"""The messages of a chat completion, as turns."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from llava_sagemaker.adapter.errors import AdapterError, invalid_request
from llava_sagemaker.adapter.json_body import LongString, beginning, too_long
from llava_triton.contract.history import PastTurn

Picture = str | LongString
"""A data URI or a URL."""


@dataclass(frozen=True)
class _Said:
    """A user's message and what was answered."""

    text: str
    images: tuple[Picture, ...]
    answer: str


@dataclass(frozen=True)
class Conversation:
    """Messages that end with a question."""

    past: tuple[_Said, ...]
    text: str
    """The question."""
    images: tuple[Picture, ...]
    """The question's pictures."""

    def all_images(self) -> list[Picture]:
        """The pictures of the past, in order, then the question's."""
        return [image for said in self.past for image in said.images] + list(self.images)

    def history(self) -> list[PastTurn]:
        """The past as the engine takes it."""
        return [PastTurn(said.text, said.answer, len(said.images)) for said in self.past]

    @cached_property
    def picture_digests(self) -> tuple[bytes, ...]:
        """Of all pictures, in order."""
        return tuple(_extended(b"", [image]) for image in self.all_images())

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
            digest = answered(_asked(digest, said.text, shown), said.answer)
        return digest

    def asked_digest(self, before: bytes) -> bytes:
        """What a conversation is known by that was known by `before` and got the question."""
        past_images = len(self.picture_digests) - len(self.images)
        return _asked(before, self.text, self.picture_digests[past_images:])


NOTHING_SAID = b""
"""The digest of a conversation that has not begun."""


def answered(asked: bytes, answer: str) -> bytes:
    """The digest of a conversation whose last question got its answer."""
    return _extended(asked, [answer])


def _asked(before: bytes, text: str, pictures: Sequence[bytes]) -> bytes:
    return _extended(before, [text, *pictures])


def _extended(digest: bytes, parts: Sequence[str | bytes | LongString]) -> bytes:
    grown = hashlib.sha256(digest)
    for part in parts:
        if isinstance(part, LongString):
            pieces = part.pieces
        else:
            pieces = (part.encode(errors="replace") if isinstance(part, str) else part,)
        grown.update(sum(map(len, pieces)).to_bytes(8, "little"))
        for piece in pieces:
            grown.update(piece)
    return grown.digest()


def read_conversation(messages: Any) -> Conversation:
    """Check a request's `messages`.

    A system message is put before the first question: the models know no other place for it.

    Raises:
        AdapterError: invalid_request, naming the message.
    """
    if not isinstance(messages, list) or not messages:
        raise invalid_request("messages must be a list with at least one message")
    said = [_message(number, message) for number, message in enumerate(messages, 1)]
    system = ""
    if said[0][0] == "system":
        system = said.pop(0)[1]
    expected = "user"
    for number, (role, _, _) in enumerate(said, len(messages) - len(said) + 1):
        if role != expected:
            raise invalid_request(
                f"message {number} is the {role}'s where one of the {expected} was expected; after "
                "at most one system message, user and assistant take turns"
            )
        expected = "assistant" if role == "user" else "user"
    if expected == "user":
        raise invalid_request("the last message must be the user's, the question to answer")
    if system:
        role, text, images = said[0]
        said[0] = (role, f"{system}\n{text}", images)
    for number, (role, text, _) in enumerate(said, len(messages) - len(said) + 1):
        if role == "user" and not text:
            raise invalid_request(f"message {number} has no text; each user message needs some")
    pairs = zip(said[:-1:2], said[1::2], strict=True)
    past = tuple(_Said(user[1], user[2], assistant[1]) for user, assistant in pairs)
    return Conversation(past, said[-1][1], said[-1][2])


def _message(number: int, message: Any) -> tuple[str, str, tuple[Picture, ...]]:
    """-> role, text, pictures."""
    name = f"message {number}"
    if not isinstance(message, dict):
        raise invalid_request(f"{name} is no object with role and content")
    role = message.get("role")
    if role == "developer":
        role = "system"
    if role not in ("system", "user", "assistant"):
        raise invalid_request(
            f"{name} has the role {str(role)[:80]!r}; it must be system, user or assistant"
        )
    if message.get("tool_calls") or message.get("function_call"):
        raise invalid_request(f"{name} calls tools, which is not supported")
    texts: list[str] = []
    images: list[Picture] = []
    for kind, value in _parts(name, message.get("content")):
        if kind == "image":
            images.append(value)
        elif isinstance(value, LongString):
            raise too_long(name, value)
        else:
            texts.append(value)
    if images and role != "user":
        raise invalid_request(f"{name} is the {role}'s and has a picture; only users show pictures")
    return role, "\n".join(texts), tuple(images)


def _parts(name: str, content: Any) -> Iterator[tuple[str, str | LongString]]:
    if isinstance(content, str | LongString):
        yield "text", content
        return
    if not isinstance(content, list):
        raise invalid_request(f"the content of {name} must be a string or a list of parts")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str | LongString):
            yield "text", part["text"]
        elif kind == "image_url":
            image = part.get("image_url")
            url = image.get("url") if isinstance(image, dict) else image
            if not isinstance(url, str | LongString) or ":" not in beginning(url):
                raise AdapterError(
                    400,
                    "image_invalid",
                    f"{name} has an image_url that is no URL; give a data URI, an https:// or an "
                    "s3:// URL",
                )
            yield "image", url
        else:
            raise invalid_request(
                f"{name} has a part that is neither text nor image_url: {str(kind)[:80]!r}"
            )
