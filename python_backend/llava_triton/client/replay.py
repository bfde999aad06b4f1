"""A session that its server has lost is opened again, with all that was said in it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

from llava_triton.client.transport import LostConnectionError, Transport, TurnMessage
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import ErrorCode, SessionError, not_found
from llava_triton.contract.history import PastTurn


class ReplayTransport(Transport):
    """One session over another transport: it remembers the session's pictures and turns.

    A turn that finds its session unknown or expired, or whose server is lost, is asked once more,
    in a session opened anew with the same history; so the answer is the same.
    """

    def __init__(self, transport: Transport) -> None:
        super().__init__()  # the tenant is the other transport's
        self._transport = transport
        self._session_id: int | str = 0
        self._turns: list[PastTurn] = []
        self._pending: list[int] = []
        """Of each turn's pictures, those that came before its question, without one."""
        self._pictures: list[bytes] = []
        """Those of all turns, then those that no question has come with yet."""
        self._truncation: str | None = None
        """What was said last of a full context."""
        self._told_anew = False
        """Whether the session was opened by a history, which does not say what came when."""

    def open(self, turn: TurnMessage) -> tuple[int | str, Delta]:
        """Open the session and begin to remember."""
        self._session_id, final = self._transport.open(turn)
        self._remember(turn, final.text)
        return self._session_id, final

    def ask(self, turn: TurnMessage) -> Delta:
        """One turn; where the session is lost, in a new one.

        A turn that ends the session is not worth a new one.
        """
        kept = turn.operation.rewind
        forgets = kept is not None and kept <= len(self._turns)
        try:
            if forgets and self._told_anew:
                raise not_found("its server knows what was said, but not what came when")
            final = self._transport.ask(self._here(turn))
        except SessionError as error:
            if turn.end or not _is_lost(error):
                raise
            if forgets:
                return self._rewind_anew(turn, error)
            self._open_again(error)
            final = self._transport.ask(self._here(turn))
        self._remember(turn, final.text)
        return final

    def another(self) -> ReplayTransport:
        """A connection like this one, with all that this one remembers."""
        return self._remembering(self._transport.another())

    def fork(self, source: int | str, session_id: int | str | None) -> tuple[Transport, int | str]:
        """Fork the session; where it is lost, open it again first."""
        try:
            other, opened = self._transport.fork(self._session_id, session_id)
        except SessionError as error:
            if not _is_lost(error):
                raise
            self._open_again(error)
            other, opened = self._transport.fork(self._session_id, session_id)
        fork = self._remembering(other)
        fork._session_id = opened
        return fork, opened

    def stop_answer(self, session_id: int | str) -> Delta:
        """End the session's running answer; a session that is lost gives none."""
        return self._transport.stop_answer(self._session_id)

    def _remembering(self, transport: Transport) -> ReplayTransport:
        copy = ReplayTransport(transport)
        copy._turns, copy._pending = self._turns.copy(), self._pending.copy()
        copy._pictures, copy._told_anew = self._pictures.copy(), self._told_anew
        copy._truncation = self._truncation
        return copy

    def stream(self, turn: TurnMessage) -> Generator[Delta, None, None]:
        """Pieces of the answer; after a loss in mid-answer, only what the caller lacks.

        That takes an answer that can be had twice: a greedy one, or one with a seed.
        """
        given, told = "", 0
        try:
            with closing(self._transport.stream(self._here(turn))) as deltas:
                for delta in deltas:
                    given += delta.text
                    told += len(delta.logprobs)
                    yield self._noted(turn, delta, given)
            return
        except SessionError as error:
            if not _is_lost(error) or (given and not _is_repeatable(turn.sampling)):
                raise
            self._open_again(error)
        yield from self._rest(turn, given, told)

    def close(self) -> None:
        """Let the connection go."""
        self._transport.close()

    def _rest(self, turn: TurnMessage, given: str, told: int) -> Generator[Delta, None, None]:
        """The answer once more, without the text and the tokens' logprobs that the caller has."""
        text = ""
        with closing(self._transport.stream(self._here(turn))) as deltas:
            for delta in deltas:
                had = max(len(text), len(given))
                text += delta.text
                same = text.startswith(given) or (given.startswith(text) and not delta.is_final)
                if not same:
                    raise SessionError(
                        ErrorCode.INTERNAL,
                        "the session was lost in mid-answer and opened again, but there the "
                        "answer differs from what had come; ask again",
                    )
                rest = replace(delta, text=text[had:], logprobs=delta.logprobs[told:])
                told = max(0, told - len(delta.logprobs))
                yield self._noted(turn, rest, text)

    def _noted(self, turn: TurnMessage, delta: Delta, text: str) -> Delta:
        if delta.is_final:
            self._remember(turn, text)
        return delta

    def _here(self, turn: TurnMessage) -> TurnMessage:
        return replace(turn, session_id=self._session_id)

    def _remember(self, turn: TurnMessage, answer: str) -> None:
        if turn.operation.rewind is not None and turn.operation.rewind < len(self._turns):
            self._forget(turn.operation.rewind)
        if turn.operation.regenerate and self._turns:
            self._turns[-1] = replace(self._turns[-1], answer=answer)
            del self._pictures[self._asked_about :]
        self._truncation = turn.sampling.get("truncation") or self._truncation
        pending = len(self._pictures) - self._asked_about
        self._pictures += turn.images
        if turn.text:
            images = pending + len(turn.images)
            self._turns.append(PastTurn(turn.text, answer, images, turn.positions))
            self._pending.append(pending)

    def _rewind_anew(self, turn: TurnMessage, lost: SessionError) -> Delta:
        """Open the session again without what the turn forgets."""
        record = self._turns.copy(), self._pending.copy(), self._pictures.copy()
        self._remember(turn, "")
        try:
            return self._open_again(lost)
        except SessionError:
            self._turns, self._pending, self._pictures = record
            raise

    @property
    def _asked_about(self) -> int:
        """Pictures that the questions were about."""
        return sum(past.images for past in self._turns)

    def _forget(self, kept: int) -> None:
        """All turns but the first ones; what was shown before the next question stays."""
        pending = self._pending[kept]
        del self._turns[kept:], self._pending[kept:]
        del self._pictures[self._asked_about + pending :]

    def _open_again(self, lost: SessionError) -> Delta:
        opening = TurnMessage(
            self._session_id,
            start=True,
            images=tuple(self._pictures),
            history=tuple(self._turns),
            sampling={} if self._truncation is None else {"truncation": self._truncation},
        )
        try:
            self._session_id, final = self._transport.open(opening)
        except SessionError as error:
            raise SessionError(
                error.code,
                f"the session was lost ({lost.sentence}) and cannot be opened again with its "
                f"{len(self._turns)} turns and {len(self._pictures)} pictures: {error.sentence}",
            ) from error
        self._told_anew = bool(self._turns)
        return final


def _is_lost(error: SessionError) -> bool:
    return error.code is ErrorCode.NOT_FOUND or isinstance(error, LostConnectionError)


def _is_repeatable(sampling: Mapping[str, Any]) -> bool:
    """Whether the answer is the same when asked for again: greedy or seeded."""
    return not sampling.get("temperature") or sampling.get("seed") is not None
