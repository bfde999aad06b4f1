"""Several answers to one question (`n` of a chat completion).

The first answer's turn opens a session. When its prompt is computed, each other answer is a fork of
that session at the question: it holds the same keys and values, and computes the prompt's last
token alone. What was opened for them is ended when all have begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

import grpc

from llava_sagemaker.adapter.engines import Engines
from llava_sagemaker.adapter.session_ids import new_session_id
from llava_sagemaker.adapter.turns import LENGTH_BYTES, TritonTurn, packed
from llava_triton.contract.answers import ANSWER
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.contract.models import SAMPLING_PARAMETERS
from llava_triton.contract.operations import Operation
from llava_triton.contract.sampling_parameters import MAX_SEED

LEAST_SECONDS = 1.0
"""A later answer has at least so long, or what the first one has."""

_ending: set[asyncio.Task[None]] = set()
"""Sessions that are being ended; whoever asked has gone."""


@dataclass(frozen=True)
class ChoicePiece(Delta):
    """A piece of one of several answers."""

    index: int = field(kw_only=True)
    """Of the answer."""
    is_last: bool = field(kw_only=True)
    """Whether all answers have ended with it."""

    @property
    def is_final(self) -> bool:
        """Whether no piece of any answer follows."""
        return self.is_last


async def choices(engines: Engines, turn: TritonTurn, count: int) -> AsyncGenerator[Delta, None]:
    """Ask a question for several answers; their pieces as they come.

    Closing the generator early cancels all. Errors as for `Triton.pieces`: one ends all.

    Args:
        engines: answer.
        turn: it opens a session, and nobody else uses that.
        count: of answers, at least 2.
    """
    pieces: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue()
    asking = [asyncio.create_task(_ask(engines, turn, 0, pieces))]
    began, begun = time.monotonic(), set[int]()
    ended = 0
    try:
        while ended < count:
            index, piece = await pieces.get()
            if isinstance(piece, Exception):
                raise piece
            if len(asking) == 1 and (piece.num_output_tokens or piece.is_final):
                for other in range(1, count):
                    again = _another(turn, other, time.monotonic() - began)
                    asking.append(asyncio.create_task(_ask(engines, again, other, pieces)))
            if index not in begun:
                begun.add(index)
                if len(begun) == count:
                    _end(engines, turn)
            ended += piece.is_final
            yield ChoicePiece(**vars(piece), index=index, is_last=ended == count)
    finally:
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)
        if len(begun) < count:
            _end(engines, turn)


async def whole_choices(engines: Engines, turn: TritonTurn, count: int) -> list[Delta]:
    """The same, each answer as one piece."""
    answers: list[list[Delta]] = [[] for _ in range(count)]
    async with aclosing(choices(engines, turn, count)) as pieces:
        async for piece in pieces:
            assert isinstance(piece, ChoicePiece)
            answers[piece.index].append(piece)
    return [ANSWER.joined(answer) for answer in answers]


async def _ask(
    engines: Engines,
    turn: TritonTurn,
    index: int,
    pieces: asyncio.Queue[tuple[int, Delta | Exception]],
) -> None:
    """Put the pieces of one answer into the queue, or why there are none."""
    try:
        async with aclosing(engines.pieces(turn)) as given:
            async for piece in given:
                pieces.put_nowait((index, piece))
                if piece.is_final:
                    return
        raise SessionError(ErrorCode.INTERNAL, "the answer broke off")
    except Exception as error:
        pieces.put_nowait((index, error))


def _another(turn: TritonTurn, index: int, late: float) -> TritonTurn:
    """The turn of another answer, so many seconds later: the same sampling, but for the seed, which
    is as many higher, and the time, which is as much less."""
    tensors = {}
    if SAMPLING_PARAMETERS.name in turn.tensors:
        data = b"".join(turn.tensors[SAMPLING_PARAMETERS.name].pieces)[LENGTH_BYTES:]
        sampling = json.loads(data)
        if isinstance(sampling.get("seed"), int):  # the engine has taken it
            sampling["seed"] = (sampling["seed"] + index) % (MAX_SEED + 1)
        given = sampling.get("max_seconds")
        if given is not None:
            sampling["max_seconds"] = max(given - late, min(given, LEAST_SECONDS))
        tensors[SAMPLING_PARAMETERS.name] = packed([json.dumps(sampling).encode()])
    again = Operation(fork=turn.session_id, regenerate=True).to_parameters()
    return TritonTurn(new_session_id(), True, True, tensors, turn.tenant, again)


def _end(engines: Engines, turn: TritonTurn) -> None:
    """End a turn's session, once it is answered or given up."""

    async def end() -> None:
        with contextlib.suppress(SessionError, grpc.aio.AioRpcError):  # it is ended already
            await engines.whole(TritonTurn(turn.session_id, end=True, tenant=turn.tenant))

    task = asyncio.create_task(end())
    _ending.add(task)
    task.add_done_callback(_ending.discard)
