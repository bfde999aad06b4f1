"""Whether the engine behind Triton answers."""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from llava_sagemaker.adapter.errors import AdapterError, as_adapter_error, unavailable
from llava_sagemaker.adapter.session_ids import new_session_id
from llava_sagemaker.adapter.turns import Triton, turn
from llava_triton.contract.errors import ErrorCode, SessionError

SECONDS = 1.5
"""SageMaker waits 2 s for /ping."""
FRESH_SECONDS = 1.0
"""An answer of the engine is good for so long."""


class Health:
    """Asks the engine for nothing: a session that opens and ends in one turn, without a text.

    Triton calls a model ready although its process has died; only an answer tells.
    """

    def __init__(self, triton: Triton) -> None:
        self._triton = triton
        self._answered_at = -FRESH_SECONDS
        self._asking = asyncio.Lock()
        self._failing = False

    async def response(self, http: HttpRequest) -> Response:
        """200 where the engine answers, else 503."""
        try:
            await self.check()
        except AdapterError as error:
            return error.response()
        return Response(status_code=200)

    async def check(self) -> None:
        """Raises AdapterError (503) where the engine does not answer."""
        async with self._asking:
            if time.monotonic() - self._answered_at < FRESH_SECONDS:
                return
            try:
                async with asyncio.timeout(SECONDS):
                    await self._triton.whole(turn(new_session_id(), start=True, end=True))
            except TimeoutError:
                raise unavailable(f"the model has not answered within {SECONDS} s") from None
            except Exception as error:
                if not _is_alive(error):
                    # Told once: SageMaker asks every few seconds while a model loads.
                    told = as_adapter_error(
                        error, logging.DEBUG if self._failing else logging.WARNING
                    )
                    self._failing = True
                    raise AdapterError(503, told.code, told.sentence) from error
            self._failing = False
            self._answered_at = time.monotonic()


def _is_alive(error: Exception) -> bool:
    """Whether the engine itself refused: it is full."""
    return isinstance(error, SessionError) and error.code is ErrorCode.UNAVAILABLE
