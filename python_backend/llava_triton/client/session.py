"""A session with a picture."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

from llava_triton.client.answer import Answer, AnswerStream, whole_answer
from llava_triton.client.opening import Address, asking, opening_turn
from llava_triton.client.pictures import Picture, Video, encoded_pictures, encoded_video, shown
from llava_triton.client.replay import ReplayTransport
from llava_triton.client.resuming import ResumingTransport
from llava_triton.client.transport import Transport, TurnMessage, regenerating, rewinding
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import SessionError
from llava_triton.contract.history import PastTurn
from llava_triton.contract.sampling_parameters import Truncation


class Session:
    """A conversation whose state stays on the server; make one with `Session.open`.

        with Session.open("grpc://localhost:8001", image="cat.jpg") as session:
            print(session.ask("What is in the picture?").text)
            for piece in session.stream("And what colour is it?"):
                print(piece, end="", flush=True)

    Where the server has lost the session and has a journal (docs/sessions.md), the next turn brings
    it back, and only takes longer. One turn at a time: a session is not for several threads.
    """

    def __init__(self, transport: Transport, session_id: int | str) -> None:
        self.id = session_id
        """As it was opened; on SageMaker a replay opens it again under another one."""
        self._transport = transport
        self._open = False
        self._stream: AnswerStream | None = None

    @classmethod
    def open(
        cls,
        url: str,
        image: Picture | Iterable[Picture] | None = None,
        session_id: int | str | None = None,
        replay: bool = False,
        tenant: str | None = None,
        history: Sequence[PastTurn] = (),
        truncation: Truncation | None = None,
        resume: int | str | None = None,
        video: Video | None = None,
        num_frames: int | None = None,
    ) -> Session:
        """Open a session; the server encodes and prefills the pictures before this returns.

        Args:
            url: `grpc://host:port`, `http://host:port` or `sagemaker://endpoint-name`, with
                `?region=` where AWS's own settings name none, and `&endpoint_url=` for another
                SageMaker runtime than AWS's, such as a local one.
            image: a picture or several, to begin with.
            video: one to begin with, behind the pictures: a file, or its frames as pictures.
            num_frames: how many of a video file's frames are shown, evenly over its length;
                None: as many as the server shows.
            session_id: the correlation ID; by default a random one, which nobody can guess. On
                SageMaker the server chooses it.
            replay: when the server has lost the session (it expired, or the server died), open a
                new one, tell it all that was said and shown, and ask again. For that the
                client keeps the texts and the encoded pictures in memory. They go out in one
                request, which must fit: at most as many pictures as a turn may have, on SageMaker
                6 MiB.
            tenant: whose session it is, 1 to 128 letters, digits and . _ : @ / + = -. The server
                shares nothing of it with other tenants' sessions.
            history: what was said before, in another session or anywhere else; `image` then begins
                with the pictures of these turns. What the server still has of it is not computed
                again.
            truncation: "auto" lets the session forget its oldest turns where the context is full,
                instead of refusing the turn; an answer's `num_forgotten_turns` says how many. A
                turn may say otherwise for itself.
            resume: the ID of a session to go on with, which the server or its journal has; `image`
                joins it. Leave `session_id`, `history` and `truncation` out then.

        Raises:
            SessionError: no server there, a bad picture, a full server, or no session to resume.
        """
        address = Address.of(url)
        transport = connect(address, tenant)
        if replay:
            transport = ReplayTransport(transport)
        try:
            shows = shown(image, video, num_frames)
            opened, _ = transport.open(
                opening_turn(address, shows, session_id, history, truncation, resume)
            )
        except BaseException:
            transport.close()
            raise
        session = cls(transport, opened)
        session._open = True
        return session

    def ask(
        self,
        text: str,
        image: Picture | Iterable[Picture] | None = None,
        video: Video | None = None,
        num_frames: int | None = None,
        image_positions: Sequence[int] | None = None,
        **sampling: Any,
    ) -> Answer:
        """Ask, and wait for the whole answer.

        Args:
            text: the question.
            image: pictures that join the conversation with it.
            video: a video that joins it, behind the pictures: a file, or its frames as pictures.
            num_frames: how many of a video file's frames are shown, evenly over its length;
                None: as many as the server shows.
            image_positions: before which character of the text each picture stands, and at last
                the video; None: all of them before it.
            sampling: the fields of `SamplingParameters`, such as max_tokens or temperature.

        Raises:
            SessionError: the session is as it was before the turn.
        """
        return self._send(
            asking(self.id, text, image, video, num_frames, image_positions, sampling)
        )

    def stream(
        self,
        text: str,
        image: Picture | Iterable[Picture] | None = None,
        video: Video | None = None,
        num_frames: int | None = None,
        image_positions: Sequence[int] | None = None,
        **sampling: Any,
    ) -> AnswerStream:
        """Ask, and get the answer piece by piece; arguments as for `ask`.

        Errors come from iterating: SessionError, the session is then as it was before the turn.
        """
        turn = asking(self.id, text, image, video, num_frames, image_positions, sampling)
        return self._begin_stream(turn)

    def add_image(self, image: Picture | Iterable[Picture]) -> Answer:
        """Show more pictures without asking; the next question is about them too."""
        return self._send(TurnMessage(self.id, images=encoded_pictures(image)))

    def add_video(self, video: Video, num_frames: int | None = None) -> Answer:
        """Show a video without asking, or the next frames of a camera, as a list of pictures.

        What came before is not computed again.
        """
        return self._send(TurnMessage(self.id, images=encoded_video(video, num_frames)))

    def regenerate(self, **sampling: Any) -> Answer:
        """Answer the last question again, in the place of the last answer.

        Nothing of the conversation is computed again. Pictures shown since that answer go with it.

        Args:
            sampling: as for `ask`; another `seed` gives another answer where `temperature` is not
                0.

        Raises:
            SessionError: the last answer is there as before; INVALID_ARG where there is none.
        """
        return self._send(regenerating(self.id, sampling))

    def stream_again(self, **sampling: Any) -> AnswerStream:
        """As `regenerate`, piece by piece; left early, the last answer is there as before."""
        return self._begin_stream(regenerating(self.id, sampling))

    def rewind(self, turns: int) -> Answer:
        """Keep the first `turns` completed turns, and forget what was said and shown in later ones.

        Pictures that were shown before the next question came, and without one, stay. So 0 takes
        the session back to how it was opened. Nothing is computed again.

        Args:
            turns: how many to keep.

        Returns:
            An answer without text; its `num_input_tokens` are what is left.

        Raises:
            SessionError: the session is as it was; INVALID_ARG where it has fewer turns.
        """
        return self._send(rewinding(self.id, turns))

    def fork(self, session_id: int | str | None = None) -> Session:
        """Open another session that has all that was said and shown in this one so far.

        The two share what was computed, and go on independently. Nothing is computed again.

        Args:
            session_id: the new session's ID, as for `open`.

        Raises:
            SessionError: UNAVAILABLE, a full server; NOT_FOUND, this session has expired.
        """
        self._leave_stream()
        transport, opened = self._transport.fork(self.id, session_id)
        session = type(self)(transport, opened)
        session._open = True
        return session

    def close(self) -> None:
        """End the session; the server frees all it held. Closing twice is fine."""
        if self._open:
            self._open = False
            # It may have expired, or the server may be gone: then it is closed already.
            with contextlib.suppress(SessionError):
                self._leave_stream()
                self._transport.ask(TurnMessage(self.id, end=True))
        self._transport.close()

    def _send(self, turn: TurnMessage) -> Answer:
        self._leave_stream()
        began = time.perf_counter()
        final: Delta = self._transport.ask(turn)
        return whole_answer(final, final.first_token_ms / 1000.0, time.perf_counter() - began)

    def _begin_stream(self, turn: TurnMessage) -> AnswerStream:
        self._leave_stream()
        deltas = self._transport.stream(turn)
        self._stream = AnswerStream(deltas, lambda: self._transport.stop_answer(self.id))
        return self._stream

    def _leave_stream(self) -> None:
        """A new turn ends the one whose answer nobody reads any more."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(address: Address, tenant: str | None) -> Transport:
    """A connection, which is the caller's to close."""
    if address.scheme == "grpc":
        from llava_triton.client.grpc import GrpcTransport

        return ResumingTransport(GrpcTransport(address.place, tenant))
    if address.scheme == "http":
        from llava_triton.client.http import HttpTransport

        return ResumingTransport(HttpTransport(address.place, tenant))
    from llava_triton.client.sagemaker import SageMakerTransport

    return SageMakerTransport(address.place, **address.options, tenant=tenant)
