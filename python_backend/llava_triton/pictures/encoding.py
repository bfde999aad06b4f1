"""Turns' pictures -> image features: decoded picture by picture, encoded in batches of tiles.

    submit ──► a lane a session ──► workers decode ──► one thread encodes ──► answers
                                       │   ▲
                                       ▼   │
                              one thread asks for room

Sessions take turns, picture by picture: one with eight large pictures keeps nobody's single one
waiting for more than the picture that is being decoded. Large ones are decoded one at a time, so
that a worker is left for the others. Videos are decoded one at a time by a worker of their own. A
picture has one tile or several, by the checkpoint's family.
Pictures take turns tile by tile: whatever session a picture is of, and however many tiles others
have, its first tile goes into the next batch.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llava_triton.contract.errors import ErrorCode, SessionError, invalid, unavailable
from llava_triton.contract.models import IMAGE
from llava_triton.device import wait_for
from llava_triton.pictures.decode import numbered
from llava_triton.pictures.feature_cache import EncodedImages

log = logging.getLogger(__name__)

MOST_BEGUN = 16
"""Turns of several pictures that are worked on at the same time, if all their features fit into
memory: each keeps those that it has until it has them all."""


class Picture(Protocol):
    """A picture that was looked at and is not decoded yet."""

    @property
    def is_large(self) -> bool:
        """Whether no second one such should be decoded at the same time."""

    @property
    def is_video(self) -> bool:
        """Whether it is a video, which keeps no picture waiting, however long it takes."""

    def decode(self) -> Decoded:
        """Make pixel values of it.

        Raises:
            SessionError: it cannot be decoded; the sentence lacks a subject.
        """


class Decoded(Protocol):
    """A picture between the image processor and the vision encoder."""

    @property
    def pixels(self) -> np.ndarray:
        """Of its tiles: float32 [N, 3, H, W]."""

    @property
    def tokens(self) -> int:
        """That it will have."""

    def features(self, tiles: Tensor) -> Tensor:
        """Encoded tiles [N, T, D] -> the features of the picture, [`tokens`, D]."""


Look = Callable[[bytes], Picture]
"""Checks what can be checked without decoding; called on several threads.

Raises SessionError, whose sentence lacks a subject."""
Encode = Callable[[np.ndarray], Tensor]
"""Pixel values of tiles, float32 [N, 3, H, W] -> features [N, T, D] on any device, in memory that
may be taken back. Only ever called on one thread."""
AskForRoom = Callable[[Hashable], None]
"""Raises SessionError where a session could not open now. Only ever called on one thread."""
Answer = Callable[[Sequence[Tensor] | SessionError], None]
"""Is called once a turn: with the features [T, D] of each of its pictures, or why there are
none."""


@dataclass(eq=False)
class _TurnWithPictures:
    """One turn of a session."""

    lane: Hashable
    items: list[bytes]
    """Empty in the place of one that was looked at."""
    answer: Answer
    tenant: str
    opening: Hashable | None
    """The session for which room is to be asked for before a picture is decoded."""
    features: list[Tensor | None] = field(init=False)
    """[R, D] of each picture."""
    tokens: list[int] = field(init=False)
    """Of each picture; 0: not known yet."""
    looked_at: int = 0
    over: bool = False

    def __post_init__(self) -> None:
        self.features = [None] * len(self.items)
        self.tokens = [0] * len(self.items)


@dataclass(eq=False)
class _Encoding:
    """A picture that is being encoded, tile by tile."""

    key: bytes
    picture: Decoded
    begun: int = 0
    """Tiles that have gone into a batch."""
    tiles: list[Tensor] = field(default_factory=list)
    """Features [T, D] of those that have come back, in order."""
    failure: Exception | None = None

    @property
    def left(self) -> int:
        """Tiles that have not gone into a batch."""
        return len(self.picture.pixels) - self.begun


class PictureEncoding:
    """Makes the image features of all sessions' turns.

    Args:
        look, encode, ask_for_room: see their types.
        encoded: what was encoded lately; not to be used by anybody else.
        workers: threads that decode, at least 2.
        max_batch: tiles in one call of `encode`.
        most_tokens: that the pictures of a turn may have; one with more is refused before the
            picture that is too much is encoded.
        most_begun: turns of several pictures that may be worked on at once.
        most_waiting: turns that may wait or be worked on at once.
    """

    def __init__(
        self,
        look: Look,
        encode: Encode,
        ask_for_room: AskForRoom,
        encoded: EncodedImages,
        *,
        workers: int,
        max_batch: int,
        most_tokens: int,
        most_begun: int = MOST_BEGUN,
        most_waiting: int,
    ) -> None:
        self._look, self._encode, self._ask_for_room = look, encode, ask_for_room
        self._max_batch = max_batch
        self._most_tokens = most_tokens
        self._most_begun = most_begun
        self._most_waiting = most_waiting
        self.hits = 0
        """Pictures that did not have to be encoded."""
        self.misses = 0
        """Pictures that had to."""
        self._changed = threading.Condition()
        """Guards all that follows."""
        self._encoded = encoded
        self._lanes: dict[Hashable, deque[_TurnWithPictures]] = {}
        """Turns that are not answered yet, by session, in the order they came."""
        self._waiting = 0
        self._ready: deque[_TurnWithPictures] = deque()
        """Whose next picture can be looked at, in the order of their last ones."""
        self._held_back: deque[_TurnWithPictures] = deque()
        """Of several pictures, while `most_begun` such turns are worked on."""
        self._begun = 0
        self._openings: deque[_TurnWithPictures] = deque()
        """For which room is to be asked for."""
        self._large: deque[tuple[_TurnWithPictures, bytes, Picture]] = deque()
        """Large pictures, one a turn, until none is decoded."""
        self._large_is_decoded = False
        self._videos: deque[tuple[_TurnWithPictures, bytes, Picture]] = deque()
        """Videos, one a turn, until their worker takes them."""
        self._decoded: deque[_Encoding] = deque()
        """Pictures some of whose tiles are to be encoded; whose turn is next first."""
        self._coming: dict[bytes, list[tuple[_TurnWithPictures, int]]] = {}
        """Who waits for a picture that is being decoded or encoded, by its key."""
        self._stopping = False
        loops = [self._work] * workers
        loops += [self._work_on_videos, self._encode_batches, self._ask]
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in loops]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        lane: Hashable,
        items: Sequence[bytes],
        answer: Answer,
        *,
        tenant: str = "",
        opening: Hashable | None = None,
    ) -> None:
        """Make the features of a turn's pictures; it is answered after the session's earlier turns.

        A turn without a picture is answered at once, here, where no other of its session is before
        it, and is never one too many.

        Args:
            lane: the session.
            items: pictures as they were sent.
            answer: hears of it, on any thread.
            tenant: whose pictures they are.
            opening: the session that the turn opens, as `ask_for_room` takes it.

        Raises:
            SessionError: UNAVAILABLE, too many turns wait; `answer` is not called then.
        """
        turn = _TurnWithPictures(lane, list(items), answer, tenant, opening)
        with self._changed:
            if items and self._stopping:
                raise unavailable("the server is shutting down")
            if items and self._waiting >= self._most_waiting:
                raise unavailable(
                    f"{self._most_waiting} turns with pictures are waiting; try again later"
                )
            before = self._lanes.get(lane)
            if before is not None or items:
                self._waiting += 1
                self._lanes.setdefault(lane, deque()).append(turn)
                if before is None:
                    self._start(turn)
                return
        _tell(turn, [])

    @property
    def stopping(self) -> bool:
        """Whether no more pictures are taken."""
        return self._stopping

    @property
    def waiting_to_encode(self) -> int:
        """Decoded pictures that the encoder has not had the last tile of."""
        return len(self._decoded)

    def shutdown(self) -> None:
        """Let pictures that are worked on finish; the turns that wait are refused."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        while self._lanes:
            lane = next(iter(self._lanes.values()))
            self._end(lane[0], unavailable("the server is shutting down"))

    # Workers.

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._has_work())
                if self._stopping:
                    return
                large = self._next_large()
                turn = None if large else self._ready.popleft()
            if turn is not None:
                self._look_at_next(turn)
            elif large is not None:
                self._decode(*large)
                with self._changed:
                    self._large_is_decoded = False
                    self._changed.notify_all()

    def _work_on_videos(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._stopping or (self._videos and self._has_space())
                )
                if self._stopping:
                    return
                video = self._videos.popleft()
            self._decode(*video)

    def _has_work(self) -> bool:
        more = bool(self._ready or (self._large and not self._large_is_decoded))
        return more and self._has_space()

    def _has_space(self) -> bool:
        # Pixel values are made no faster than they are encoded. A single picture of many tiles, or
        # a video, leaves room for another: its first tile goes into the next batch.
        most = self._max_batch
        return sum(min(each.left, most) for each in self._decoded) < 2 * most

    def _next_large(self) -> tuple[_TurnWithPictures, bytes, Picture] | None:
        if self._large_is_decoded or not self._large:
            return None
        self._large_is_decoded = True
        return self._large.popleft()

    def _look_at_next(self, turn: _TurnWithPictures) -> None:
        if turn.over:
            return
        number = turn.looked_at
        item = turn.items[number]
        key = self._encoded.key(turn.tenant, item)
        with self._changed:
            features = self._encoded.find(key)
            new = features is None and key not in self._coming
            if new and turn.opening is not None:
                self._openings.append(turn)
                self._changed.notify_all()
                return
            turn.looked_at += 1
            turn.items[number] = b""  # what is made of it takes memory enough
            self.misses += new
            self.hits += not new
            if features is None:
                waiting = self._coming.setdefault(key, [])
                for other, place in waiting[:1]:
                    turn.tokens[number] = other.tokens[place]
                waiting.append((turn, number))
            else:
                turn.features[number] = features
                turn.tokens[number] = len(features)
        if new:
            self._open(turn, key, item)
        else:
            self._refuse_if_too_much(turn)
            self._go_on(turn)

    def _open(self, turn: _TurnWithPictures, key: bytes, item: bytes) -> None:
        try:
            picture = self._look(item)
        except Exception as error:
            self._have(key, error)
            return
        if picture.is_video or picture.is_large:
            waiting = self._videos if picture.is_video else self._large
            with self._changed:
                waiting.append((turn, key, picture))
                self._changed.notify_all()
        else:
            self._decode(turn, key, picture)

    def _decode(self, turn: _TurnWithPictures, key: bytes, picture: Picture) -> None:
        try:
            decoded = picture.decode()
            tokens = decoded.tokens
        except Exception as error:
            self._have(key, error)
            return
        with self._changed:
            for each, number in self._coming[key]:
                each.tokens[number] = tokens
            showing = [each for each, _ in self._coming[key]]
        for each in showing:
            self._refuse_if_too_much(each)
        with self._changed:
            self._decoded.append(_Encoding(key, decoded))
            self._changed.notify_all()
        self._go_on(turn)

    def _refuse_if_too_much(self, turn: _TurnWithPictures) -> None:
        """End a turn whose pictures, as far as they are known, are longer than the context."""
        with self._changed:
            known = [each for each in turn.tokens if each]
        if sum(known) <= self._most_tokens:
            return
        images, remedy = "image", "a smaller one"
        if len(turn.items) > 1:
            images = f"{len(known)} of the turn's {len(turn.items)} images"
            remedy = "fewer or smaller ones"
        sentence = (
            f"{images} would take {sum(known)} tokens and the model's context is "
            f"{self._most_tokens}; send {remedy}"
        )
        self._end(turn, invalid(sentence, IMAGE.name))

    def _go_on(self, turn: _TurnWithPictures) -> None:
        """To the turn's next picture, behind all other sessions' next ones; or to its end."""
        with self._changed:
            if turn.over:
                return
            if turn.looked_at < len(turn.items):
                self._ready.append(turn)
                self._changed.notify_all()
                return
        self._end_if_complete(turn)

    # The thread that encodes.

    def _encode_batches(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._decoded)
                if self._stopping:
                    return
                batch = self._next_batch()
                self._changed.notify_all()
            if batch:
                self._encode_tiles(batch)

    def _next_batch(self) -> list[tuple[_Encoding, np.ndarray]]:
        """A tile of each picture in turn, of those that somebody still waits for; the lock is
        held."""
        batch: list[tuple[_Encoding, np.ndarray]] = []
        while self._decoded and len(batch) < self._max_batch:
            each = self._decoded.popleft()
            if each.failure is not None or self._is_unwanted(each.key):
                continue
            batch.append((each, each.picture.pixels[each.begun : each.begun + 1]))
            each.begun += 1
            if each.left:
                self._decoded.append(each)
        return batch

    def _is_unwanted(self, key: bytes) -> bool:
        """Whether the turns that show a picture were refused meanwhile; it is forgotten then."""
        if any(not turn.over for turn, _ in self._coming[key]):
            return False
        del self._coming[key]
        return True

    def _encode_tiles(self, batch: list[tuple[_Encoding, np.ndarray]]) -> None:
        features = self._features_of([pixels for _, pixels in batch])
        for (each, _), outcome in zip(batch, features, strict=True):
            if each.failure is not None:
                continue
            if isinstance(outcome, Exception):
                each.failure = outcome
                self._have(each.key, outcome)
                continue
            each.tiles.append(outcome)
            if len(each.tiles) == len(each.picture.pixels):
                self._have(each.key, self._features_of_picture(each))

    def _features_of(self, batch: list[np.ndarray]) -> list[Tensor | Exception]:
        """Features [T, D] of each tile float32 [1, 3, H, W], or why there are none."""
        try:
            features = self._encode(np.concatenate(batch))
            # Copies: a row of a batch would keep the whole batch in memory.
            copies = [each.clone() for each in features]
            wait_for(features)  # only begun yet, and `features` is another's when this returns
            return list(copies)
        except Exception as error:
            if len(batch) == 1:
                return [error]
            # What fails alone has failed.
            return [outcome for each in batch for outcome in self._features_of([each])]

    def _features_of_picture(self, encoding: _Encoding) -> Tensor | Exception:
        try:
            return encoding.picture.features(torch.stack(encoding.tiles))
        except Exception as error:
            return error

    def _have(self, key: bytes, outcome: Tensor | Exception) -> None:
        """A picture has become features [T, D], or cannot: tell all turns that show it."""
        with self._changed:
            turns = self._coming.pop(key)
            if isinstance(outcome, Tensor):
                self._encoded.add(key, outcome)
                for turn, number in turns:
                    turn.features[number] = outcome
                    turn.tokens[number] = len(outcome)
        for turn, number in turns:
            if isinstance(outcome, SessionError):
                self._end(turn, numbered(outcome, number + 1, len(turn.items)))
            elif isinstance(outcome, Exception):
                self._end(turn, _failure(outcome))
            else:
                self._refuse_if_too_much(turn)
                self._end_if_complete(turn)

    def _end_if_complete(self, turn: _TurnWithPictures) -> None:
        with self._changed:
            features = [each for each in turn.features if each is not None]
        if len(features) == len(turn.items):
            self._end(turn, features)

    # The thread that asks for room.

    def _ask(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._openings)
                if self._stopping:
                    return
                turn = self._openings.popleft()
            assert turn.opening is not None
            try:
                self._ask_for_room(turn.opening)
            except SessionError as error:
                self._end(turn, error)
                continue
            except Exception:
                log.exception("nobody could be asked for room")  # language_model will tell
            with self._changed:
                turn.opening = None
                self._ready.appendleft(turn)
                self._changed.notify_all()

    # Lanes.

    def _start(self, turn: _TurnWithPictures) -> None:
        """A turn with pictures has become its session's first; the lock is held."""
        if len(turn.items) > 1 and self._begun >= self._most_begun:
            self._held_back.append(turn)
            return
        self._begun += len(turn.items) > 1
        self._ready.append(turn)
        self._changed.notify_all()

    def _end(self, turn: _TurnWithPictures, outcome: list[Tensor] | SessionError) -> None:
        """Answer a turn, unless that was done, and those behind it that have no picture."""
        with self._changed:
            if turn.over:
                return
            turn.over = True
            if len(turn.items) > 1:
                self._begun -= 1
                if self._held_back:
                    self._start(self._held_back.popleft())
        _tell(turn, outcome)
        while True:
            with self._changed:
                self._waiting -= 1
                lane = self._lanes[turn.lane]
                lane.popleft()
                if not lane:
                    del self._lanes[turn.lane]
                    return
                turn = lane[0]
                if turn.items:
                    self._start(turn)
                    return
            _tell(turn, [])


def _tell(turn: _TurnWithPictures, outcome: list[Tensor] | SessionError) -> None:
    try:
        turn.answer(outcome)
    except Exception as error:  # such as no memory for all of them, or none that is shared
        failure = _failure(error)
        with contextlib.suppress(Exception):  # nobody is there to tell
            turn.answer(failure)


def _failure(error: Exception) -> SessionError:
    log.error("a picture could not be encoded", exc_info=error)
    return SessionError(ErrorCode.INTERNAL, f"the picture could not be encoded: {error}")
