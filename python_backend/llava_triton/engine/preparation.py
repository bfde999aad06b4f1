"""How a turn begins: what its client asked becomes tokens to compute."""

from __future__ import annotations

from collections.abc import Sequence

from llava_triton.conversation import ConversationRenderer, Past, too_long
from llava_triton.detokenizer import Detokenizer
from llava_triton.engine.model_runner import ModelRunner
from llava_triton.engine.session import Session
from llava_triton.engine.turn import RunningTurn, Turn, TurnRequest
from llava_triton.errors import invalid
from llava_triton.history import PastTurn
from llava_triton.paged_attention.interface import BLOCK_TOKENS
from llava_triton.sampling import Draws
from llava_triton.settings import Settings


class TurnPreparation:
    """Checks turns against their sessions and the model, and renders their prompts.

    Args:
        runner: the language model.
        tokenizer: the checkpoint's tokenizer.
        renderer: of its conversations.
        settings: limits.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: object,
        renderer: ConversationRenderer,
        settings: Settings,
    ) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._renderer = renderer
        self._settings = settings

    @property
    def _context(self) -> int:
        """Tokens of a conversation at the most: one session may have all blocks, never more."""
        return min(self._runner.context_length, self._runner.pages.blocks * BLOCK_TOKENS)

    def past(self, request: TurnRequest) -> Past:
        """Check what needs nothing of the session, and make tokens of what was said before.

        It may take long, and other turns must not wait for it: for the caller's thread.

        Raises:
            SessionError: INVALID_ARG, the turn cannot be computed, whatever its session is.
        """
        runner = self._runner
        if request.is_empty and not (request.start or request.end):
            raise invalid(
                "the turn has neither text_input nor image; send a question, a picture or both"
            )
        if request.history and not request.start:
            raise invalid(
                "history came with a turn of an open session, which knows what was said; send it "
                "with the sequence start flag"
            )
        new_images = 0
        if request.image_features is not None:
            new_images, per_image, width = request.image_features.shape
            if (per_image, width) != (runner.tokens_per_image, runner.hidden_size):
                raise invalid(
                    f"image_features has the shape {tuple(request.image_features.shape)}; this "
                    f"model takes [N, {runner.tokens_per_image}, {runner.hidden_size}]"
                )
        past_images = _pictures(request.history)
        if past_images > new_images:
            raise invalid(
                f"history speaks of {past_images} pictures and 'image' holds {new_images}; send "
                "the pictures of all past turns, in order, then those of the new turn"
            )
        self._renderer.check_length(request.text or "", self._context)
        return self._renderer.past(request.history, self._context)

    def prepare(self, turn: Turn, session: Session) -> RunningTurn:
        """Work out what a turn has to compute, changing nothing.

        Raises:
            SessionError: INVALID_ARG, the turn cannot be computed as it is.
        """
        if turn.fault is not None:
            raise turn.fault
        request = turn.request
        said = turn.past if request.start else (session.history, session.last_answer)
        history, last_answer = list(said[0]), said[1]
        new_images = len(request.image_digests) - _pictures(request.history)
        images = session.pending_images + new_images
        prompt = self._renderer.prompt(history, last_answer, request.text, images)
        wanted = request.sampling.max_tokens or self._settings.default_max_tokens
        room = self._context - len(prompt)
        if room < (0 if request.text is None else 1):
            raise too_long(len(prompt), self._context)
        remembered = session.reusable_prefix(prompt)
        if request.text is not None:
            remembered = min(remembered, len(prompt) - 1)  # the last one's logits begin the answer
        return RunningTurn(
            turn=turn,
            session=session,
            history=history,
            last_answer=last_answer,
            prompt=prompt,
            remembered=remembered,
            images_before=len(session.images),
            images=images,
            max_tokens=0 if request.text is None else min(wanted, room),
            draws=Draws(request.sampling),
            detokenizer=Detokenizer(self._tokenizer, request.sampling.stop),
            cached_tokens=remembered,
        )


def _pictures(history: Sequence[PastTurn]) -> int:
    return sum(turn.images for turn in history)
