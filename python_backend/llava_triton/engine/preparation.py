"""How a turn begins: what its client asked becomes tokens to compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llava_triton.contract.errors import invalid
from llava_triton.contract.history import PastTurn
from llava_triton.contract.positions import check_positions
from llava_triton.contract.settings import Settings
from llava_triton.conversation.detokenizer import Detokenizer
from llava_triton.conversation.prompt import Prompt
from llava_triton.conversation.renderer import ConversationRenderer, Past, too_long
from llava_triton.device import work_beside
from llava_triton.engine.image_store import Digest, digest_of
from llava_triton.engine.session import Session
from llava_triton.engine.turn import Prepared, RunningTurn, Turn, TurnRequest
from llava_triton.kernels.base import BLOCK_TOKENS
from llava_triton.model.runner import ModelRunner
from llava_triton.model.sampling import Draws

SHORT_TEXT_CHARACTERS = 2048
"""Up to so many the engine's own thread makes tokens of a text, in a millisecond or two: it would
take another thread as long to begin."""


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

    def takes_long(self, request: TurnRequest) -> bool:
        """Whether to prepare a turn takes longer than to have another thread do it."""
        return bool(
            request.image_features
            or request.history
            or len(request.text or "") > SHORT_TEXT_CHARACTERS
        )

    def prepare(
        self, request: TurnRequest, last_answer: str | None, pending: Sequence[int]
    ) -> Prepared:
        """Check a turn and make tokens of it. It may take long; for any thread.

        Args:
            request: the turn.
            last_answer: text of its session's last answer; None before the first.
            pending: tokens of each image that came without a question since.

        Raises:
            SessionError: INVALID_ARG, the turn cannot be computed as it is.
        """
        self._check(request)
        shown = _pictures(request.history)
        lengths = [len(features) for features in request.image_features]
        past = Past(Prompt(), last_answer)
        if request.start:
            past = self._renderer.past(request.history, lengths[:shown], self._context)
        images = [*pending, *lengths[shown:]]
        message = self._renderer.message(
            past.last_answer, request.text, images, request.image_positions or ()
        )
        return Prepared(past, message, self._digests(request))

    def begin(self, turn: Turn, prepared: Prepared, session: Session) -> RunningTurn:
        """Work out what a turn has to compute, changing nothing.

        Raises:
            SessionError: INVALID_ARG, it does not fit into the model's context.
        """
        request = turn.request
        before = len(prepared.past.prompt) if request.start else session.committed
        prompt_tokens = before + len(prepared.message)
        wanted = request.sampling.max_tokens or self._settings.default_max_tokens
        room = self._context - prompt_tokens
        if room < (0 if request.text is None else 1):
            spans = [*prepared.past.prompt.spans, *prepared.message.spans]
            of_images = sum(span.length for span in spans)
            raise too_long(prompt_tokens, self._context, of_images=of_images)
        return RunningTurn(
            turn=turn,
            session=session,
            prompt_tokens=prompt_tokens,
            images_before=len(session.images),
            max_tokens=0 if request.text is None else min(wanted, room),
            draws=Draws(request.sampling),
            detokenizer=Detokenizer(self._tokenizer, request.sampling.stop),
            last_answer=prepared.past.last_answer,
            pending_images=len(prepared.message.spans),
        )

    def _check(self, request: TurnRequest) -> None:
        """Raises INVALID_ARG where anything of a turn is not as it should be."""
        if request.is_empty and not (request.start or request.end):
            raise invalid(
                "the turn has neither text_input nor image; send a question, a picture or both"
            )
        if request.history and not request.start:
            raise invalid(
                "history came with a turn of an open session, which knows what was said; send it "
                "with the sequence start flag"
            )
        tokens, width = 0, self._runner.hidden_size
        for number, features in enumerate(request.image_features, 1):
            if features.dim() != 2 or not len(features) or features.shape[1] != width:
                raise invalid(
                    f"image_features has the shape {list(features.shape)} for picture {number}; "
                    f"this model takes [T, {width}], with one row for each token of the picture"
                )
            tokens += len(features)
        if tokens > self._context:
            raise too_long(tokens, self._context, of_images=tokens)
        past_images, images = _pictures(request.history), len(request.image_features)
        if past_images > images:
            raise invalid(
                f"history speaks of {past_images} pictures and 'image' holds {images}; send "
                "the pictures of all past turns, in order, then those of the new turn"
            )
        check_positions(request.image_positions, request.text, images - past_images)
        self._renderer.check_length(request.text or "", self._context)

    def _digests(self, request: TurnRequest) -> tuple[Digest, ...]:
        if not request.image_features:
            return ()
        with work_beside(self._runner.device):  # it waits for what is copied to the host
            for number, features in enumerate(request.image_features, 1):
                # A NaN among them would be both; an infinite one is the largest or the smallest.
                if not all(torch.isfinite(each) for each in features.aminmax()):
                    raise invalid(
                        f"image_features holds values that are not finite, in picture {number}; "
                        "they come from the vision encoder: send another picture"
                    )
            return tuple(digest_of(each, request.tenant) for each in request.image_features)


def _pictures(history: Sequence[PastTurn]) -> int:
    return sum(turn.images for turn in history)
