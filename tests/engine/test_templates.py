"""Conversations turn by turn are, token for token, what a template makes of them at once.

The templates have the forms of the published checkpoints': where roles, pictures and the ends of
messages are.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

from llava_triton.contract.history import PastTurn
from llava_triton.conversation.renderer import ConversationRenderer
from tests.tokenizers_for_tests import byte_level, sentence_piece

IMAGES = "{% for part in m.content if part.type == 'image' %}<image>\n{% endfor %}"
TEXT = "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
TEMPLATES = {
    # LLaVA-1.5, LLaVA-1.6 with Vicuna
    "names": (
        "{% for m in messages %}{{ m.role.upper() + ': ' }}" + IMAGES + TEXT + "{{ ' ' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    # LLaVA-1.6 with Mistral
    "brackets": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}"
        + IMAGES
        + TEXT
        + "{{ ' [/INST]' }}{% else %}{{ ' ' + m.content[0].text + '</s>' }}{% endif %}{% endfor %}"
    ),
    # LLaVA-OneVision, LLaVA-1.6-34B, LLaVA interleave
    "ChatML": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        + IMAGES
        + TEXT
        + "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # LLaVA-NeXT with Llama 3
    "headers": (
        "{% for m in messages %}{{ '<|head|>' + m.role + '<|tail|>\n\n' }}"
        + IMAGES
        + TEXT
        + "{{ '<|eot|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>assistant<|tail|>\n\n' }}{% endif %}"
    ),
}
CONTROL = ["<image>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|tail|>", "<|eot|>"]
TURNS = (
    PastTurn("What is it?", "A red circle.", 1),
    PastTurn("And what about é, 漢字 and 🙂?", "Two squares, one of them blue.", 2),
    PastTurn("Is it large?", "No.", 0),
)
LENGTHS = [3, 1, 7]


@pytest.mark.parametrize(
    ("name", "maker"),
    [
        ("names", sentence_piece),
        ("brackets", sentence_piece),
        ("ChatML", sentence_piece),
        ("ChatML", byte_level),
        ("headers", byte_level),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_turns_are_what_the_template_makes_of_a_conversation(name: str, maker: Any) -> None:
    tokenizer = copy.deepcopy(maker())
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    tokenizer.chat_template = TEMPLATES[name]
    placeholder = tokenizer.convert_tokens_to_ids("<image>")
    renderer = ConversationRenderer(tokenizer, placeholder)
    past = renderer.past(TURNS, LENGTHS, 10_000)
    message = renderer.message(past.last_answer, "Thank you.", [2])
    found = [*past.prompt.ids, *message.ids]

    messages: list[dict[str, Any]] = []
    for turn in (*TURNS, PastTurn("Thank you.", "", 1)):
        shown = [{"type": "image"}] * turn.images
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": turn.text}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    whole = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    expected: list[int] = []
    lengths = iter([*LENGTHS, 2])
    for token in tokenizer(whole)["input_ids"]:
        expected += [token] * (next(lengths) if token == placeholder else 1)
    assert tokenizer.convert_ids_to_tokens(found) == tokenizer.convert_ids_to_tokens(expected)
