"""How a turn begins: what its client asked becomes tokens to compute."""

from __future__ import annotations

from llava_triton.conversation import ConversationRenderer
from llava_triton.detokenizer import Detokenizer
from llava_triton.engine.model_runner import ModelRunner
from llava_triton.engine.session import Session
from llava_triton.engine.turn import RunningTurn, Turn
from llava_triton.errors import invalid
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

    def prepare(self, turn: Turn, session: Session) -> RunningTurn:
        """Work out what a turn has to compute, changing nothing.

        Raises:
            SessionError: INVALID_ARG, the turn cannot be computed as it is.
        """
        request, runner = turn.request, self._runner
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
        history, last_answer = session.history, session.last_answer
        if request.start:
            history, last_answer = self._renderer.past(request.history)
        past_images = sum(turn.images for turn in request.history)
        if past_images > new_images:
            raise invalid(
                f"history speaks of {past_images} pictures and 'image' holds {new_images}; send "
                "the pictures of all past turns, in order, then those of the new turn"
            )
        images = session.pending_images + new_images - past_images
        prompt = self._renderer.prompt(history, last_answer, request.text, images)
        wanted = request.sampling.max_tokens or self._settings.default_max_tokens
        # One session may have all blocks, never more.
        context = min(runner.context_length, runner.pages.blocks * BLOCK_TOKENS)
        room = context - len(prompt)
        if room < (0 if request.text is None else 1):
            raise invalid(
                f"the conversation would be {len(prompt)} tokens long and the model's context is "
                f"{context}; shorten the text or open a new session"
            )
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
