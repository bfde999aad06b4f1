"""HTTP: whole answers through `llava`."""

from __future__ import annotations

from collections.abc import Generator
from http.client import HTTPException

import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from llava_triton.client.transport import Transport, TurnMessage, delta_of, session_error
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import SessionError, invalid

ANSWER_SECONDS = 600.0
"""The longest an answer may take; tritonclient's own default is a minute."""


def no_streams() -> SessionError:
    """What a stream over HTTP is told."""
    return invalid(
        "Triton cannot stream a session's answers over HTTP; open the session by a "
        "grpc://host:port URL, or use ask()"
    )


class HttpTransport(Transport):
    """A connection to `host:port`.

    Args:
        address: `host:port`.
        tenant: see `Transport`.
    """

    def __init__(self, address: str, tenant: str | None = None) -> None:
        super().__init__(tenant)
        self._address = address
        self._client = triton.InferenceServerClient(address, network_timeout=ANSWER_SECONDS)

    def another(self) -> HttpTransport:
        """A connection to the same address."""
        return HttpTransport(self._address, self.tenant)

    def ask(self, turn: TurnMessage) -> Delta:
        """One request, one answer."""
        try:
            result = self._client.infer("llava", **turn.request(triton, self.parameters))
        except (InferenceServerException, OSError, HTTPException) as error:
            raise session_error(error, self._address) from error
        return delta_of(result)

    def stream(self, turn: TurnMessage) -> Generator[Delta, None, None]:
        """Not possible: Triton's HTTP streaming endpoint takes no sequence ID."""
        raise no_streams()

    def close(self) -> None:
        """Let the connection go."""
        self._client.close()
