"""Asks the demo checkpoint about pictures it has never seen: ``python demo/evaluate.py``.

Whole conversations, with the model's own earlier answers as the history, through nothing but
transformers. An answer counts when it is the expected one, word for word.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging

# Allows `python demo/evaluate.py` beside `python -m demo.evaluate`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo.conversations import Conversation, random_conversation
from demo.data import EVALUATION, picture, stream

CHECKPOINT = Path(__file__).resolve().parent / "checkpoint"
AT_ONCE = 64
MAX_NEW_TOKENS = 96
REQUIRED = 0.95


@dataclass
class Asked:
    """One question, as it went."""

    conversation: int
    kind: str
    follow_up: bool
    question: str
    expected: str
    answer: str

    @property
    def correct(self) -> bool:
        """Whether the answer is the expected one, but for case and space."""
        return self.answer.lower().split() == self.expected.lower().split()


def load(checkpoint: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Model (in float32) and processor of a checkpoint folder."""
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(checkpoint)


@torch.no_grad()
def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    histories: list[list[dict[str, Any]]],
    images: list[list[Image.Image]],
) -> list[str]:
    """The model's greedy answers to conversations that end with a question."""
    prompts = [
        processor.apply_chat_template(history, add_generation_prompt=True, tokenize=False)
        for history in histories
    ]
    flat = [image for some in images for image in some]
    inputs = processor(text=prompts, images=flat or None, padding=True, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    texts = processor.batch_decode(
        made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [text.strip() for text in texts]


def hold(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, first: int, count: int
) -> list[Asked]:
    """Hold conversations number ``first`` and following, all at the same time."""
    conversations: list[Conversation] = []
    waiting: list[list[Image.Image]] = []
    for number in range(first, first + count):
        rng = stream(EVALUATION, number)
        conversations.append(random_conversation(rng, turns=rng.randint(4, 10)))
        waiting.append([picture(scene, rng) for scene in conversations[-1].scenes])
    histories: list[list[dict[str, Any]]] = [[] for _ in conversations]
    shown: list[list[Image.Image]] = [[] for _ in conversations]
    asked = []
    for step in range(max(len(conversation.turns) for conversation in conversations)):
        active = [i for i in range(count) if step < len(conversations[i].turns)]
        for i in active:
            turn = conversations[i].turns[step]
            content: list[dict[str, str]] = [{"type": "text", "text": turn.question}]
            if turn.picture:
                content.insert(0, {"type": "image"})
                shown[i].append(waiting[i].pop(0))
            histories[i].append({"role": "user", "content": content})
        texts = answers(
            model, processor, [histories[i] for i in active], [shown[i] for i in active]
        )
        for i, text in zip(active, texts, strict=True):
            turn = conversations[i].turns[step]
            histories[i].append({"role": "assistant", "content": [{"type": "text", "text": text}]})
            asked.append(
                Asked(first + i, turn.kind, turn.follow_up, turn.question, turn.answer, text)
            )
    return asked


def evaluate(checkpoint: Path, questions: int) -> list[Asked]:
    """Ask at least so many questions."""
    model, processor = load(checkpoint)
    asked: list[Asked] = []
    first = 0
    while len(asked) < questions:
        # A conversation has seven questions on average; never many more than asked for.
        count = min(AT_ONCE, max(1, (questions - len(asked)) // 7 + 1))
        asked += hold(model, processor, first, count)
        first += count
    return asked


def share(asked: list[Asked]) -> float:
    """The share of correct answers."""
    return sum(one.correct for one in asked) / len(asked)


def table(asked: list[Asked]) -> str:
    """Results by kind of question, with follow-ups apart."""
    groups: dict[tuple[bool, str], list[Asked]] = defaultdict(list)
    for one in asked:
        groups[one.follow_up, one.kind].append(one)
    later = [one for one in asked if one.follow_up]
    rows = [
        (f"{kind} (follow-up)" if follow_up else kind, group)
        for (follow_up, kind), group in sorted(groups.items())
    ]
    rows += [("all follow-ups", later), ("all questions", asked)]
    lines = ["| Kind of question | Asked | Correct | Share |", "| --- | ---: | ---: | ---: |"]
    for name, group in rows:
        correct = sum(one.correct for one in group)
        lines.append(f"| {name} | {len(group)} | {correct} | {100 * share(group):.1f} % |")
    return "\n".join(lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder to load")
    parser.add_argument("--questions", type=int, default=1500, help="ask at least so many")
    parser.add_argument("--json", type=Path, help="write every question and answer to this file")
    parser.add_argument("--mistakes", action="store_true", help="print the wrong answers")
    arguments = parser.parse_args()
    if not (arguments.checkpoint / "config.json").is_file():
        parser.error(f"there is no checkpoint in {arguments.checkpoint}")
    if arguments.questions < 1:
        parser.error("--questions must be at least 1")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    start = time.monotonic()
    asked = evaluate(arguments.checkpoint, arguments.questions)
    later = [one for one in asked if one.follow_up]
    print(table(asked))
    print(f"\n{len(asked)} questions in {time.monotonic() - start:.0f} s")
    if arguments.mistakes:
        for one in asked:
            if not one.correct:
                print(f"{one.question}\n  expected {one.expected}\n  answered {one.answer}")
    if arguments.json:
        results = [asdict(one) | {"correct": one.correct} for one in asked]
        summary = {"questions": len(asked), "all": share(asked)}
        if later:
            summary["follow_ups"] = share(later)
        arguments.json.write_text(json.dumps(summary | {"asked": results}, indent=1) + "\n")
    if any(share(some) < REQUIRED for some in (asked, later) if some):
        print(f"Below the required {REQUIRED:.0%}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
