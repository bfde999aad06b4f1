"""Turns as tokens: from a user's message to the token IDs that continue a conversation.

A session's history is the token IDs the model has really seen and said. A new turn is rendered by
the checkpoint's chat template and only *its* text is tokenized, because tokenizing the whole
conversation again could split an earlier answer differently and make its cached keys useless.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llava_triton.contract.errors import SessionError, invalid
from llava_triton.contract.history import PastTurn
from llava_triton.contract.sampling_parameters import MAX_STOP_CHARACTERS
from llava_triton.conversation.prompt import CompletedTurn, Prompt, expanded
from llava_triton.conversation.token_bound import FewestTokens


@dataclass(frozen=True)
class Past:
    """What was said before a turn."""

    prompt: Prompt = field(default_factory=Prompt)
    """Up to the end of the last answer."""
    turns: tuple[CompletedTurn, ...] = ()
    """What it consists of."""
    forgotten: int = 0
    """Turns that it consisted of before they were forgotten."""

    @property
    def last_answer(self) -> str | None:
        """Text of the last answer; None: nothing was said."""
        return self.turns[-1].answer if self.turns else None


def too_long(tokens: int, context: int, of_images: int = 0) -> SessionError:
    """A conversation of at least so many tokens does not fit; some are of pictures that came."""
    shown = f" ({of_images} of them for the images of this turn)" if of_images else ""
    fewer = ", show fewer or smaller images" if of_images else ""
    return invalid(
        f"the conversation would be at least {tokens} tokens long{shown} and the model's context "
        f"is {context}; shorten the text{fewer}, open a new session, or let its oldest turns be "
        'forgotten ("truncation": "auto")'
    )


SPARE_TOKENS = 16
"""That an answer may have behind its stop string."""


class ConversationRenderer:
    """Renders turns with a checkpoint's chat template and tokenizer.

    Args:
        tokenizer: the checkpoint's tokenizer, with a chat template.
        image_token_id: the placeholder that stands for image features.
    """

    def __init__(self, tokenizer: Any, image_token_id: int) -> None:
        self._tokenizer = tokenizer
        self._image_token_id = image_token_id
        # Stands for the last answer in a rendered window; nothing a client sends can equal it.
        self._answer_mark = uuid.uuid4().hex
        # Stands before and behind every control token that a client or an answer has spelled.
        self._spelled_mark = uuid.uuid4().hex
        control = {
            token.content: token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special or token_id == image_token_id
        }
        longest_first = sorted(control, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._spelled = {name: _spelled_ids(tokenizer, name, control) for name in control}
        """The tokens of a control token's name, as the text that it is for whoever writes it."""
        self._fewest_tokens = FewestTokens(tokenizer.backend_tokenizer)
        # The first use may change how the tokenizer is set; from then on any thread may use it.
        self._tokenize(self._answer_mark)

    def message(
        self,
        last_answer: str | None,
        text: str | None,
        images: Sequence[int] = (),
        positions: Sequence[int] = (),
    ) -> Prompt:
        """What a turn adds to a conversation, up to where the model speaks.

        Args:
            last_answer: text of the last answer; None in a new conversation.
            text: the user's text; None where only images came so far: the message then ends with
                the last image's last token, because what follows depends on the question.
            images: tokens of each image in this message, those first that came without text.
            positions: of the last of them, as many as there are numbers: before which character of
                the text each stands. The others are where the chat template puts images.

        Returns:
            Every image as so many placeholders. What the user spells like a control token of the
            tokenizer, `</s>` for one, or like the placeholder, is text.
        """
        if text is None and not images:
            return Prompt()
        message = self._user_message(text or "", len(images) - len(positions), positions)
        if last_answer is None:
            new_ids = self._tokenize_opening(self._render([message]))
        else:
            window = self._render([self._user_message("", 0), self._assistant_message(), message])
            said = self._as_text(_last_word(last_answer))
            new_ids = self._tokenize_after(said, window.split(self._answer_mark, 1)[1])
        prompt = expanded(new_ids, self._image_token_id, images)
        if text is None:
            del prompt.ids[prompt.spans[-1].end :]
        return prompt

    def past(
        self, turns: Sequence[PastTurn], images: Sequence[int], context: int, contexts: int = 1
    ) -> Past:
        """Turns that took place elsewhere, as if they had taken place in a new session.

        Args:
            turns: what was said.
            images: tokens of each image that was shown in them.
            context: of the model, in tokens.
            contexts: they may be so many times as long.

        Raises:
            SessionError: INVALID_ARG, it is too much.
        """
        history, shown = Prompt(), 0
        completed: list[CompletedTurn] = []
        last_answer: str | None = None
        for turn in turns:
            self.check_length(turn.text + turn.answer, context)
            lengths = images[shown : shown + turn.images]
            positions = turn.image_positions or ()
            history.append(self.message(last_answer, turn.text, lengths, positions))
            asked = len(history)
            history.append(Prompt(self._answer_tokens(turn.answer)))
            last_answer, shown = turn.answer, shown + turn.images
            number = len(completed)
            completed.append(CompletedTurn(asked, len(history), shown, 0, turn.answer, number))
            if len(history) > context * contexts:
                raise too_long(len(history), context)
        return Past(history, tuple(completed))

    def check_length(self, text: str, context: int) -> None:
        """Refuse a text that alone is longer than the context, whatever its tokens are.

        Raises:
            SessionError: INVALID_ARG.
        """
        if len(text) > context:  # fewer characters are not worth looking at
            fewest = self._fewest_tokens(text)
            if fewest > context:
                raise too_long(fewest, context)

    def _answer_tokens(self, answer: str) -> list[int]:
        """An answer as the model would have said it behind the generation prompt."""
        asked, said = self._around_answer
        # What the template puts between its generation prompt and an answer, a space often, is the
        # model's to say.
        lead = said[len(asked) :] if answer and said.startswith(asked) else ""
        return self._tokenize_after(_last_word(asked), lead + self._as_text(answer))

    @cached_property
    def _around_answer(self) -> tuple[str, str]:
        """What the template writes before an answer: to be generated, and said already."""
        question = self._user_message("", 0)
        said = self._render([question, self._assistant_message()])
        return self._render([question]), said.split(self._answer_mark, 1)[0]

    def tokens_of(self, answer_ids: Sequence[int], shown: str) -> list[int]:
        """Token IDs of the part of an answer that was shown.

        They differ from `answer_ids` when a stop string cut the text, perhaps inside a token.

        Args:
            answer_ids: every token generated, end-of-sequence excluded.
            shown: the text the client got.
        """
        # Byte-level tokenizers begin an answer with a space, which is not shown.
        lead = " " if self._decode(answer_ids).startswith(" ") else ""
        # A stop string takes away a few tokens. (Malformed text may differ from the beginning on.)
        fewest = max(0, len(answer_ids) - MAX_STOP_CHARACTERS - SPARE_TOKENS)
        for length in range(len(answer_ids), fewest, -1):
            kept = self._decode(answer_ids[:length])
            if (lead + shown).startswith(kept):
                rest = (lead + shown)[len(kept) :]
                said = self._as_text(_last_word(kept))
                return [*answer_ids[:length], *self._tokenize_after(said, self._as_text(rest))]
        return self._tokenize(lead + self._as_text(shown))[: len(answer_ids)]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _render(self, messages: list[dict[str, Any]]) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        )

    def _user_message(
        self, text: str, images: int, positions: Sequence[int] = ()
    ) -> dict[str, Any]:
        content: list[dict[str, str]] = [{"type": "image"} for _ in range(images)]
        if text or positions:
            # Many templates put all images of a message first: those inside are part of its text.
            placeholder = str(self._tokenizer.convert_ids_to_tokens(self._image_token_id))
            ends = [*positions, len(text)]
            parts = [self._as_text(text[a:b]) for a, b in zip([0, *positions], ends, strict=True)]
            content.append({"type": "text", "text": placeholder.join(parts)})
        return {"role": "user", "content": content}

    def _assistant_message(self) -> dict[str, Any]:
        content = [{"type": "text", "text": self._answer_mark}]
        return {"role": "assistant", "content": content}

    def _as_text(self, said: str) -> str:
        """What somebody has said, with marks around what is spelled like a control token."""
        mark = self._spelled_mark
        return self._control.sub(lambda spelled: f"{mark}{spelled[0]}{mark}", said)

    def _tokenize(self, text: str, special: bool = False) -> list[int]:
        """Token IDs of a text; control tokens are text where they are marked so.

        Args:
            special: begin with what the tokenizer puts before every text.
        """
        # Marks are in pairs: a name between two of them, and what goes on behind it.
        beginning, *others = text.split(self._spelled_mark)
        ids = self._encode(beginning, special) if beginning or special else []
        for name, rest in zip(others[::2], self._encode_inside(others[1::2]), strict=True):
            ids += [*self._spelled[name], *rest]
        return ids

    def _encode(self, text: str, special: bool = False) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])

    def _encode_inside(self, texts: Sequence[str]) -> list[list[int]]:
        """As `_encode`, but without the space that SentencePiece puts in front of every text."""
        if not texts:
            return []
        newline = self._encode("\n")
        behind = [f"\n{text}" for text in texts]
        encoded = self._tokenizer(behind, add_special_tokens=False)["input_ids"]
        return [
            ids[len(newline) :] if ids[: len(newline)] == newline else self._encode(text)
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def _tokenize_opening(self, text: str) -> list[int]:
        bos = self._tokenizer.bos_token
        return self._tokenize(text, special=not (bos and text.startswith(bos)))

    def _tokenize_after(self, anchor: str, text: str) -> list[int]:
        """Tokenize `text` as it would be split where it follows `anchor`.

        A tokenizer treats the beginning of a text differently from its middle (SentencePiece puts
        a space in front), so the word before goes along and is taken off again.
        """
        anchor_ids = self._tokenize(anchor)
        ids = self._tokenize(anchor + text)
        if ids[: len(anchor_ids)] == anchor_ids:
            return ids[len(anchor_ids) :]
        return self._tokenize(text)


def _last_word(text: str) -> str:
    return (text.split() or [""])[-1]


def _spelled_ids(tokenizer: Any, name: str, control: Mapping[str, int]) -> list[int]:
    """The tokens of a control token's name, where the name is text.

    Args:
        tokenizer: whose.
        name: of the control token.
        control: all of them, and their IDs.
    """
    ids = _without_added_tokens(tokenizer.backend_tokenizer, name)
    # The model's own vocabulary may know the whole name. (Of unknown characters it may know none.)
    if (set(control.values()) - {tokenizer.unk_token_id}).intersection(ids):
        ids = []
        for character in name:
            ids += _without_added_tokens(tokenizer.backend_tokenizer, character)
    return ids


def _without_added_tokens(backend: Any, text: str) -> list[int]:
    """Token IDs of a text in the middle of another one, by the model's own vocabulary alone."""

    def encode(text: str) -> list[int]:
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [text]
        if backend.pre_tokenizer is not None:
            words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in backend.model.tokenize(word)]

    # A newline before it, as in `_encode_inside`.
    newline, ids = encode("\n"), encode("\n" + text)
    return ids[len(newline) :] if ids[: len(newline)] == newline else encode(text)
