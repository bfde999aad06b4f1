"""The engines behind the adapter, a Triton each: which of them a turn goes to.

Where a session is, its engine knows. What is kept of that here may be forgotten at any time, as
after a restart of the adapter: then the engines are asked. So a session may have any ID, and the
client may have chosen it.

- A new session opens on the engine with the fewest.
- A turn without a session goes to the engine with the fewest turns in flight.
- A session that no engine has is resumed from the journal, where there is one, on the engine with
  the fewest.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field, replace

import grpc

from llava_sagemaker.adapter.session_ids import is_named
from llava_sagemaker.adapter.turns import Triton, TritonTurn
from llava_triton.contract.answers import ANSWER
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.contract.operations import FORK, RESUME, STOP_ANSWER
from llava_triton.contract.settings import Settings

SETTLED_SECONDS = 2.0
"""When the adapter starts, it knows within this time which engines serve."""
WAIT_SECONDS = 30.0
"""So long a turn waits for an engine to be started again, where a journal has its session."""
LOOK_SECONDS = 5.0
"""An engine that is asked for a session and does not answer may have it: the question waits behind
a turn of the session."""

SessionKey = tuple[str, str]
"""A tenant, and the ID by which it asks for a session: of another tenant's it learns nothing, and
changes nothing for that."""


@dataclass(eq=False)
class Engine:
    """One of them, as the adapter sees it."""

    number: int
    """From 0: of several GPUs, the GPU's."""
    triton: Triton
    serves: bool = False
    """Whether there is a connection to it."""
    serves_since: float = 0.0
    """On time.monotonic's clock."""
    turns: int = 0
    """In flight."""
    sessions: int = 0
    """That are known to be there."""
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when `serves` has been found out once."""


@dataclass(eq=False)
class _Home:
    """Where a session is."""

    engine: Engine
    used_at: float
    """When a turn of it last began or ended, on time.monotonic's clock."""
    turns: int = 0
    """In flight."""


class Engines:
    """Sends turns to engines; make it inside the event loop that uses it.

    Args:
        addresses: `host:port` of the gRPC endpoint of each.
        settings: of the model repository.
    """

    def __init__(self, addresses: Sequence[str], settings: Settings) -> None:
        self.all = [Engine(number, Triton(address)) for number, address in enumerate(addresses)]
        self.resumed = 0
        """Turns that were sent again for the journal to bring their session back."""
        self._journal = bool(settings.journal)
        self._homes = _Homes(settings.session_idle_seconds)
        self._any_serves = asyncio.Event()
        self._looks: dict[SessionKey, asyncio.Task[Engine | None]] = {}
        self._watches = [asyncio.create_task(self._watch(engine)) for engine in self.all]

    async def pieces(self, turn: TritonTurn) -> AsyncGenerator[Delta, None]:
        """Send a turn; the pieces of its answer, and its errors, as for `Triton.pieces`."""
        again: TritonTurn | None = turn
        del turn  # with its pictures: the answer may take long
        tried = False
        while again is not None:
            try:
                async with contextlib.aclosing(self._at(await self._place(again), again)) as pieces:
                    async for piece in pieces:
                        again = None
                        yield piece
                again = None
            except SessionError as error:
                if again is None or tried or not self._may_resume(again, error):
                    raise
                tried = True
                again = await self._resuming(again)

    async def whole(self, turn: TritonTurn) -> Delta:
        """Send a turn; its whole answer as one final piece. Errors as for `pieces`."""
        pieces = [piece async for piece in self.pieces(turn)]
        if not pieces or not pieces[-1].is_final:
            raise SessionError(ErrorCode.INTERNAL, "the answer broke off")
        return ANSWER.joined(pieces)

    async def close(self) -> None:
        """Let the connections go."""
        tasks = [*self._watches, *self._looks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for engine in self.all:
            await engine.triton.close()

    async def _at(self, engine: Engine, turn: TritonTurn) -> AsyncGenerator[Delta, None]:
        """A turn, sent to an engine; what is known of its session follows from how it ends."""
        is_open, end, key = False, turn.end, _key(turn)
        start = turn.start and RESUME not in turn.parameters
        engine.turns += 1
        home = None if start and end else self._homes.begins(key, engine)
        answer = engine.triton.pieces(turn)
        del turn  # with its pictures
        try:
            async with contextlib.aclosing(answer) as pieces:
                async for piece in pieces:
                    is_open = is_open or piece.is_final
                    yield piece
        except SessionError as error:
            is_open = error.code is not ErrorCode.NOT_FOUND and not start
            raise
        except BaseException:  # its client has left, perhaps served, or the engine is lost
            is_open = is_open or not start
            raise
        finally:
            engine.turns -= 1
            if home is not None:
                self._homes.ended(key, home, is_open and not end)

    # Where a turn goes.

    async def _place(self, turn: TritonTurn) -> Engine:
        if self._journal and not self._any_serves.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WAIT_SECONDS):
                    await self._any_serves.wait()
        if len(self.all) == 1:
            return self.all[0]
        await self._settle()
        other = turn.parameters.get(STOP_ANSWER, turn.parameters.get(FORK))
        if other is not None:  # of an open session
            return await self._find((turn.tenant, str(other))) or self._fewest_sessions()
        if turn.start and turn.end and RESUME not in turn.parameters:
            return min(self._serving(), key=lambda engine: (engine.turns, engine.sessions))
        if turn.start and RESUME not in turn.parameters and not is_named(turn.session_id):
            return self._fewest_sessions()  # we have just made the ID
        found = await self._find(_key(turn))
        # Others may have waited for the same answer, and one of them was first.
        return found or self._homes.engine_of(_key(turn)) or self._fewest_sessions()

    def _serving(self) -> list[Engine]:
        """Those to choose from. Where none serves, all of them: their errors say why."""
        return [engine for engine in self.all if engine.serves] or self.all

    def _fewest_sessions(self) -> Engine:
        self._homes.forget_expired()  # (as `begins` does, but before it is counted)
        return min(self._serving(), key=lambda engine: (engine.sessions, engine.turns))

    async def _find(self, key: SessionKey) -> Engine | None:
        """The engine that has a session; None: none of those that serve."""
        known = self._homes.engine_of(key)
        if known is not None:
            return known
        serving = self._serving()
        if len(serving) == 1:
            return serving[0]  # it will say
        look = self._looks.get(key)
        if look is None:
            look = self._looks[key] = asyncio.create_task(_look(serving, key))
            look.add_done_callback(lambda _: self._looks.pop(key, None))
        return await asyncio.shield(look)

    # Bringing sessions back.

    def _may_resume(self, turn: TritonTurn, error: SessionError) -> bool:
        """Whether a turn that was refused may be answered from the journal."""
        is_new = turn.start and FORK not in turn.parameters  # or resumed already
        return self._journal and error.code is ErrorCode.NOT_FOUND and not is_new

    async def _resuming(self, turn: TritonTurn) -> TritonTurn:
        """The same turn, its session brought back first. Errors as for `pieces`."""
        self.resumed += 1
        source = turn.parameters.get(FORK)
        if source is None:
            return _resumed(turn)
        await self.whole(_resumed(TritonTurn(str(source), tenant=turn.tenant)))
        return turn

    # Which engines serve.

    async def _settle(self) -> None:
        if not all(engine.settled.is_set() for engine in self.all):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SETTLED_SECONDS):
                    for engine in self.all:
                        await engine.settled.wait()

    async def _watch(self, engine: Engine) -> None:
        """Keep `serves` true to the connection. An engine that has gone has lost its sessions."""
        channel = engine.triton.channel
        while True:
            state = channel.get_state(try_to_connect=True)
            if state is grpc.ChannelConnectivity.READY and not engine.serves:
                engine.serves, engine.serves_since = True, time.monotonic()
            elif state is grpc.ChannelConnectivity.TRANSIENT_FAILURE and engine.serves:
                engine.serves = False
                self._homes.forget_engine(engine)
            if any(each.serves for each in self.all):
                self._any_serves.set()
            else:
                self._any_serves.clear()
            if state in _KNOWN:
                engine.settled.set()
            await channel.wait_for_state_change(state)


_KNOWN = (grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE)


class _Homes:
    """Where sessions are, those used last at the end.

    Args:
        idle_seconds: after so long an engine closes a session.
    """

    def __init__(self, idle_seconds: float) -> None:
        self._idle_seconds = idle_seconds
        self._homes: OrderedDict[SessionKey, _Home] = OrderedDict()

    def engine_of(self, key: SessionKey) -> Engine | None:
        """Where a session is; None: not known."""
        home = self._homes.get(key)
        return None if home is None else home.engine

    def begins(self, key: SessionKey, engine: Engine) -> _Home:
        """A turn of a session goes to an engine."""
        self.forget_expired()
        home = self._homes.get(key)
        if home is None or home.engine is not engine:
            self._forget(key)
            home = self._homes[key] = _Home(engine, 0.0)
            engine.sessions += 1
        home.turns += 1
        self._use(key, home)
        return home

    def ended(self, key: SessionKey, home: _Home, is_open: bool) -> None:
        """Such a turn has ended, and its session is still there, or not."""
        home.turns -= 1
        if self._homes.get(key) is not home:
            return  # forgotten meanwhile
        if is_open:
            self._use(key, home)
        else:
            self._forget(key)

    def forget_engine(self, engine: Engine) -> None:
        """It has lost its sessions."""
        for key in [each for each, home in self._of(engine)]:
            self._forget(key)

    def forget_expired(self) -> None:
        """Sessions that nobody has used for so long that their engines have closed them."""
        until = time.monotonic() - self._idle_seconds
        while self._homes:
            key, home = next(iter(self._homes.items()))
            if home.used_at > until:
                return
            if home.turns:
                self._use(key, home)
            else:
                self._forget(key)

    def _of(self, engine: Engine) -> Iterator[tuple[SessionKey, _Home]]:
        return (each for each in self._homes.items() if each[1].engine is engine)

    def _use(self, key: SessionKey, home: _Home) -> None:
        home.used_at = time.monotonic()
        self._homes.move_to_end(key)

    def _forget(self, key: SessionKey) -> None:
        home = self._homes.pop(key, None)
        if home is not None:
            home.engine.sessions -= 1


async def _look(engines: list[Engine], key: SessionKey) -> Engine | None:
    """The engine that has a session, by what all say to a turn that asks for nothing; where none
    has it for certain, one that may: elsewhere it would live twice."""
    nothing = TritonTurn(key[1], tenant=key[0])
    said = await asyncio.gather(*(_has(engine, nothing) for engine in engines))
    for wanted in (True, None):
        if wanted in said:
            return engines[said.index(wanted)]
    return None


async def _has(engine: Engine, nothing: TritonTurn) -> bool | None:
    """Whether an engine has the session of a turn that asks for nothing; None: it does not say."""
    try:
        async with asyncio.timeout(LOOK_SECONDS):
            await engine.triton.whole(nothing)
    except SessionError as error:
        if error.code is ErrorCode.NOT_FOUND:
            return False
        return True if error.code is ErrorCode.INVALID_ARG else None  # it was asked nothing
    except TimeoutError:
        return None
    except grpc.aio.AioRpcError:
        return False  # it has just gone, with its sessions
    return True


def _key(turn: TritonTurn) -> SessionKey:
    return turn.tenant, turn.session_id


def _resumed(turn: TritonTurn) -> TritonTurn:
    """A turn that brings its session back, or goes on in the open one."""
    return replace(turn, start=True, parameters={**turn.parameters, RESUME: True})
