"""A chat over a session of our own client: Triton's ports, SageMaker."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from llava_cli.conversation import Chat, ChatTurn, Cost
from llava_triton.client import ErrorCode, PastTurn, Session, SessionError
from llava_triton.client.opening import Address


class SessionChat(Chat):
    """Over a session, which is opened when the first turn comes, and opened again with all that was
    said where the server's and ours differ. Keys and values of an earlier session are found in the
    server's prefix cache, so that costs little.

    Args:
        url: as for `Session.open`.

    Raises:
        SessionError: INVALID_ARG, the URL names no server.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self._streams = Address.of(url).scheme != "http"
        self._session: Session | None = None

    def close(self) -> None:
        """End the session."""
        self._forget()

    def _pieces(self, turn: ChatTurn, sampling: dict[str, Any]) -> Generator[str, None, None]:
        try:
            yield from self._answer(turn, sampling)
        except SessionError as error:
            if error.code is not ErrorCode.NOT_FOUND or turn.answer:
                raise
            self._forget()  # it has expired
            yield from self._answer(turn, sampling)

    def _answer(self, turn: ChatTurn, sampling: dict[str, Any]) -> Generator[str, None, None]:
        if self._session is None:
            self._session = self._opened()
        if not self._streams:
            answer = self._session.ask(turn.text, turn.pictures, **sampling)
            yield answer.text
        else:
            with self._session.stream(turn.text, turn.pictures, **sampling) as stream:
                yield from stream
                answer = stream.answer
        turn.cost = Cost(
            answer.first_token_seconds,
            answer.num_input_tokens,
            answer.num_cached_tokens,
            answer.num_output_tokens,
        )

    def _opened(self) -> Session:
        past = [PastTurn(turn.text, turn.answer, len(turn.pictures)) for turn in self.turns]
        shown = [picture for turn in self.turns for picture in turn.pictures]
        return Session.open(self._url, image=shown, history=past)

    def _forget(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None
