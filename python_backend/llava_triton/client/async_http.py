"""HTTP on asyncio: whole answers through `llava`."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import aiohttp
import tritonclient.http.aio as triton
from tritonclient.utils import InferenceServerException

from llava_triton.client.async_transport import AsyncTransport
from llava_triton.client.http import ANSWER_SECONDS, no_streams
from llava_triton.client.transport import TurnMessage, delta_of, session_error
from llava_triton.contract.delta import Delta


class AsyncHttpTransport(AsyncTransport):
    """Connections to `host:port`.

    Args:
        address: `host:port`.
        tenant: see `Transport`.
    """

    def __init__(self, address: str, tenant: str | None = None) -> None:
        super().__init__(tenant)
        self._address = address
        self._client = triton.InferenceServerClient(address, conn_timeout=ANSWER_SECONDS)

    def another(self) -> AsyncHttpTransport:
        """Connections to the same address."""
        return AsyncHttpTransport(self._address, self.tenant)

    async def ask(self, turn: TurnMessage) -> Delta:
        """One request, one answer."""
        try:
            result = await self._client.infer("llava", **turn.request(triton, self.parameters))
        except aiohttp.ClientError as error:
            raise session_error(ConnectionError(str(error)), self._address) from error
        except (TimeoutError, InferenceServerException, OSError) as error:
            raise session_error(error, self._address) from error
        return delta_of(result)

    async def stream(self, turn: TurnMessage) -> AsyncGenerator[Delta, None]:
        """Not possible: Triton's HTTP streaming endpoint takes no sequence ID."""
        raise no_streams()
        yield  # a generator, as the others are

    async def close(self) -> None:
        """Let the connections go."""
        await self._client.close()
