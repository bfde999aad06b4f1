"""Whether the engines answer."""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from llava_sagemaker.adapter.engines import Engine, Engines
from llava_sagemaker.adapter.errors import AdapterError, as_adapter_error, unavailable
from llava_sagemaker.adapter.session_ids import new_session_id
from llava_sagemaker.adapter.turns import turn
from llava_triton.contract.errors import ErrorCode, SessionError

SECONDS = 1.5
"""SageMaker waits 2 s for /ping."""
FRESH_SECONDS = 1.0
"""An answer of an engine is good for so long."""
STUCK_SECONDS = 60.0
"""An engine of several that is connected and does not answer for so long is lost."""


class Health:
    """Asks the engines for nothing: a session that opens and ends in one turn, without a text.

    Triton calls a model ready although its process has died; only an answer tells.

    Of several engines one that answers is enough: one that has died is started again. But one that
    is connected and does not answer is nobody's to mend on this machine.

    Args:
        engines: all of them.
    """

    def __init__(self, engines: Engines) -> None:
        self._engines = [_EngineHealth(engine) for engine in engines.all]
        self._asking = asyncio.Lock()

    async def response(self, http: HttpRequest) -> Response:
        """200 where the machine serves, else 503."""
        try:
            await self.check()
        except AdapterError as error:
            return error.response()
        return Response(status_code=200)

    async def check(self) -> None:
        """Raises AdapterError (503) where no engine answers, or one of several has not for long."""
        async with self._asking:
            told = await asyncio.gather(*(engine.check() for engine in self._engines))
            failures = [error for error in told if error is not None]
            if len(failures) == len(told):
                raise failures[0]
            for engine in self._engines:
                if engine.is_stuck:
                    raise unavailable(
                        f"engine {engine.number} is connected and has not answered for "
                        f"{STUCK_SECONDS:.0f} s"
                    )


class _EngineHealth:
    """One engine's."""

    def __init__(self, engine: Engine) -> None:
        self.number = engine.number
        self._engine = engine
        self._answered_at = -FRESH_SECONDS
        self._failing = False

    @property
    def is_stuck(self) -> bool:
        """Whether it could answer, and has not for long."""
        silent_since = max(self._answered_at, self._engine.serves_since)
        return self._engine.serves and time.monotonic() - silent_since > STUCK_SECONDS

    async def check(self) -> AdapterError | None:
        """What is told where it does not answer."""
        if time.monotonic() - self._answered_at < FRESH_SECONDS:
            return None
        try:
            async with asyncio.timeout(SECONDS):
                await self._engine.triton.whole(turn(new_session_id(), start=True, end=True))
        except TimeoutError:
            return unavailable(f"the model has not answered within {SECONDS} s")
        except Exception as error:
            if not _is_alive(error):
                # Told once: SageMaker asks every few seconds while a model loads.
                level = logging.DEBUG if self._failing else logging.WARNING
                told = as_adapter_error(error, level)
                self._failing = True
                return AdapterError(503, told.code, told.sentence)
        self._failing = False
        self._answered_at = time.monotonic()
        return None


def _is_alive(error: Exception) -> bool:
    """Whether the engine itself refused: it is full."""
    return isinstance(error, SessionError) and error.code is ErrorCode.UNAVAILABLE
