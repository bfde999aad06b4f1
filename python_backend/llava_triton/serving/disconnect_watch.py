"""Stops the turn of a client that has gone: the last step of `llava_stream`."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llava_triton.contract import protocol
from llava_triton.contract.models import TURN_ID
from llava_triton.serving.backend import Backend

log = logging.getLogger(__name__)


class DisconnectWatch:
    """`disconnect_watch`: runs once per streamed response and answers with nothing."""

    def __init__(self, pb_utils: Any) -> None:
        self._backend = Backend(pb_utils)

    def initialize(self, args: dict[str, str]) -> None:
        """Calls to language_model wait in a thread of their own."""
        self._calls = ThreadPoolExecutor(max_workers=1)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Cancel the turns whose clients are gone."""
        for request in requests:
            turn_id = self._backend.array(request, TURN_ID)
            assert turn_id is not None
            if turn_id[0] and request.is_cancelled():
                self._calls.submit(self._cancel, turn_id[0].decode())
        return [self._backend.response({}) for _ in requests]

    def finalize(self) -> None:
        """Let running calls end."""
        self._calls.shutdown()

    def _cancel(self, turn_id: str) -> None:
        try:
            # A sequence of its own, of one request: Triton delivers it beside the turn it stops.
            self._backend.tell(
                "language_model",
                {protocol.CANCEL_TURN: turn_id},
                correlation_id=turn_id,
                flags=self._backend.start | self._backend.end,
            )
        except Exception as error:
            log.warning("turn %s was not stopped: %s", turn_id, error)
