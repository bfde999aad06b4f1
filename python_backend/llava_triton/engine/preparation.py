"""How a turn begins: what its client asked becomes tokens to compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llava_triton.contract.errors import invalid
from llava_triton.contract.history import PastTurn
from llava_triton.contract.operations import NO_OPERATION
from llava_triton.contract.positions import check_positions
from llava_triton.contract.settings import Settings
from llava_triton.conversation.detokenizer import Detokenizer
from llava_triton.conversation.forgetting import NewMessage, as_it_went, turns_to_forget
from llava_triton.conversation.grammar import Grammars
from llava_triton.conversation.prompt import Prompt
from llava_triton.conversation.renderer import ConversationRenderer, Past, too_long
from llava_triton.conversation.token_texts import TokenTexts
from llava_triton.device import work_beside
from llava_triton.engine.image_store import Digest, digest_of
from llava_triton.engine.session import Mark, Session
from llava_triton.engine.turn import Prepared, QueuedTurn, RunningTurn, TurnRequest
from llava_triton.kernels.base import BLOCK_TOKENS
from llava_triton.model.logits_processors import LogitsProcessors
from llava_triton.model.runner import ModelRunner
from llava_triton.model.sampling import Draws, SamplingParameters

SHORT_TEXT_CHARACTERS = 2048
"""Up to so many the engine's own thread makes tokens of a text, in a millisecond or two: it would
take another thread as long to begin."""

HISTORY_CONTEXTS = 8
"""A history whose oldest turns may be forgotten is so many times the context at the most, because
all of it has to be looked at."""


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
        self._token_texts = TokenTexts(tokenizer)
        self._grammars = Grammars(tokenizer, runner.vocabulary, runner.eos_token_ids)
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
            or (request.is_asked and request.sampling.structured_outputs)
            or len(request.text or "") > SHORT_TEXT_CHARACTERS
        )

    def prepare(
        self,
        request: TurnRequest,
        last_answer: str | None,
        pending: Sequence[int],
        again: Prompt | None = None,
    ) -> Prepared:
        """Check a turn and make tokens of it. It may take long; for any thread.

        Args:
            request: the turn.
            last_answer: text of its session's last answer; None before the first.
            pending: tokens of each image that came without a question since.
            again: the message, where an earlier one is answered again.

        Raises:
            SessionError: INVALID_ARG, the turn cannot be computed as it is.
        """
        self._check(request)
        shown = _pictures(request.history)
        lengths = [len(features) for features in request.image_features]
        past = Past()
        forgets = request.sampling.truncation == "auto"
        if request.history:
            contexts = HISTORY_CONTEXTS if forgets else 1
            past = self._renderer.past(request.history, lengths[:shown], self._context, contexts)
            last_answer = past.last_answer
        images = [*pending, *lengths[shown:]]
        positions = request.image_positions or ()
        if (message := again) is None:
            message = self._renderer.message(last_answer, request.text, images, positions)
        if forgets:
            past = as_it_went(past, NewMessage(len(message), request.is_asked), self._context)
        # A form is of an answer. And what has none, a fork for one, is prepared at once: the
        # session that it copies does not wait for it.
        form = request.sampling.structured_outputs if request.is_asked else None
        grammar = None if form is None else self._grammars.compile(form)
        return Prepared(past, message, self._digests(request), grammar)

    def begin(
        self, turn: QueuedTurn, prepared: Prepared, session: Session, mark: Mark
    ) -> RunningTurn:
        """Work out what a turn has to compute, changing nothing.

        Args:
            turn: the turn.
            prepared: what its request was made into.
            session: its session, as it is.
            mark: where the turn begins in it.

        Raises:
            SessionError: INVALID_ARG, it does not fit into the model's context.
        """
        request = turn.request
        forgets: list[int] = []
        if not request.start and (request.sampling.truncation or session.truncation) == "auto":
            new = NewMessage(len(prepared.message), request.is_asked)
            forgets = turns_to_forget(session.turns[: mark.turns], new, self._context)
        before = mark.committed + len(prepared.past.prompt)
        before -= sum(session.turn_length(index) for index in forgets)
        prompt_tokens = before + len(prepared.message)
        wanted = request.sampling.max_tokens or self._settings.default_max_tokens
        room = self._context - prompt_tokens
        if room < int(request.is_asked):
            spans = [*prepared.past.prompt.spans, *prepared.message.spans]
            of_images = sum(span.length for span in spans)
            raise too_long(prompt_tokens, self._context, of_images=of_images)
        return RunningTurn(
            turn=turn,
            session=session,
            prompt_tokens=prompt_tokens,
            mark=mark,
            forgets=forgets,
            kept_mark=session.mark(forgets[0]) if forgets else mark,
            max_tokens=min(wanted, room) if request.is_asked else 0,
            draws=Draws(request.sampling),
            processors=LogitsProcessors(
                request.sampling,
                self._runner.eos_token_ids,
                None if prepared.grammar is None else prepared.grammar.allowed,
            ),
            grammar=prepared.grammar,
            detokenizer=Detokenizer(
                self._tokenizer, request.sampling.stop, request.sampling.min_tokens
            ),
            token_texts=self._token_texts,
            pending_images=len(prepared.message.spans),
        )

    def where_to_begin(self, request: TurnRequest, session: Session) -> Mark:
        """The mark in its session, which is open or a fork's source, where a turn begins.

        Raises:
            SessionError: INVALID_ARG, what its operation asks for does not go with the rest of the
                request, or not with the session.
        """
        operation, turns = request.operation, session.answered
        if operation.regenerate and request.has_message:
            raise invalid(
                "regenerate answers the last question again, and a new message came with it; send "
                "it without text_input, image and history"
            )
        if operation.regenerate and operation.rewind is not None:
            raise invalid("rewind and regenerate came in one request; send them one by one")
        if operation.fork is not None and request.has_message:
            raise invalid(
                "fork only opens a session, and more came with it; ask in the session's next turn"
            )
        if request.start and operation.fork is None and operation != NO_OPERATION:
            raise invalid(
                f"{' and '.join(operation.to_parameters())} came with the sequence start flag, "
                "which opens a new session; send it in an open one"
            )
        if operation.fork is not None and not request.start:
            raise invalid(
                "fork opens a session; send it with the sequence start flag and another sequence "
                "ID than that of the session to copy"
            )
        if operation.regenerate:
            mark = session.last_question()
            if mark is None:
                raise invalid("there is no answer to regenerate in the session; ask first")
            return mark
        kept = turns if operation.rewind is None else operation.rewind
        if kept > turns:
            raise invalid(
                f"the session cannot be rewound to turn {kept}; it has {turns} completed turns: "
                f"give 0 to {turns}"
            )
        return session.mark_behind(kept)

    def _check(self, request: TurnRequest) -> None:
        """Raises INVALID_ARG where anything of a turn is not as it should be."""
        nothing = request.is_empty and request.operation.rewind is None
        if nothing and not (request.start or request.end):
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
        self._check_token_ids(request.sampling)

    def _check_token_ids(self, sampling: SamplingParameters) -> None:
        named = {
            "logit_bias": [token for token, _ in sampling.logit_bias],
            "stop_token_ids": sampling.stop_token_ids,
        }
        for name, ids in named.items():
            if max(ids, default=0) >= self._runner.vocabulary:
                raise invalid(
                    f"sampling parameter {name} has the token ID {max(ids)}; this model's are 0 to "
                    f"{self._runner.vocabulary - 1}"
                )

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
