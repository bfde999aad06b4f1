"""Decode steps in shapes made beforehand: what is filled up around a step changes nothing in it.

Here they run on the CPU, where they are not recorded: the shapes and what is put into them are
those of a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from llava_triton.kernels.base import BLOCK_TOKENS, Rows
from llava_triton.model.decode_graphs import DecodeGraphs
from llava_triton.model.step import StepPart
from llava_triton.model.text_model import TextModel
from tests.engine_harness import EngineHarness
from tests.small_engine import PICTURES, Alone, Ask, Start, long_ask

ANSWERS = 5
"""At once: no size of a recorded step."""


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of sequences of the steps that were taken from the records."""
    seen: list[int] = []
    logits = DecodeGraphs.logits

    def counted(self: DecodeGraphs, parts: Sequence[StepPart]) -> Tensor:
        seen.append(len(parts))
        return logits(self, parts)

    monkeypatch.setattr(DecodeGraphs, "logits", counted)
    return seen


def test_answers_side_by_side_equal_those_alone(
    start: Start, alone: Alone, shapes: list[int]
) -> None:
    # Those that begin later end later: the answers beside one another get fewer one by one.
    openings = [long_ask("red"), Ask("Hi", max_tokens=20, ignore_eos=True)]
    openings += [
        Ask("What is it?", (picture,), 30 + 10 * number, ignore_eos=True)
        for number, picture in enumerate(PICTURES[:3])
    ]
    question = Ask("And the other one?", max_tokens=12)
    harness = start(record=True)
    with harness.held_device():
        first = [each.submit(harness, str(n), start=True) for n, each in enumerate(openings)]
    texts = [[each.wait()[0]] for each in first]
    for number, pending in enumerate([question.submit(harness, str(n)) for n in range(ANSWERS)]):
        texts[number].append(pending.wait()[0])
    assert texts == [alone(opening, question) for opening in openings]
    assert set(shapes) == {1, 2, 3, 4, ANSWERS}


def test_drawn_answers_are_the_same(start: Start, checkpoint: Path, shapes: list[int]) -> None:
    texts = []
    for record in (True, False):
        harness = start(record=record)
        waiting = [
            harness.submit("s", "Tell me.", start=True, temperature=1.5, seed=3, ignore_eos=True),
            harness.submit("t", "Tell me.", start=True, temperature=0.7, top_p=0.9, seed=4),
        ]
        texts.append([each.wait()[0] for each in waiting])
    assert texts[0] == texts[1]
    assert shapes


def test_only_the_sessions_own_blocks_and_the_spare_one_are_written(
    start: Start, shapes: list[int]
) -> None:
    harness = start(record=True)
    harness.restart()  # all pages are NaN
    names = ("s", "t", "u")
    with harness.held_device():
        asked = [
            Ask(name, max_tokens=20, ignore_eos=True).submit(harness, name, start=True)
            for name in names
        ]
    for each in asked:
        each.wait()
    assert 3 in shapes  # filled up to 4
    written = harness.runner.pages.keys[0].isnan().logical_not().flatten(1).any(1)
    found = {int(block) for block in written.nonzero()}
    expected = {block for name in names for block in harness.session(name).key_values.blocks}
    assert found == {*expected, harness.runner.pages.spare}


def test_a_step_that_was_not_recorded_is_left_alone() -> None:
    shapes: list[tuple[int, int]] = []

    def decode(ids: Tensor, rows: Rows, out: Tensor) -> Tensor:
        shapes.append(tuple(rows.block_tables.shape))  # type: ignore[arg-type]
        assert torch.equal(rows.starts, torch.arange(len(ids) + 1, dtype=torch.int32))
        assert torch.equal(rows.positions, rows.contexts.long())
        return out.copy_(torch.stack((ids, rows.contexts, rows.block_tables[:, 0]), dim=1))

    context = 100 * BLOCK_TOKENS
    records = DecodeGraphs(decode, torch.device("cpu"), 999, 3, context, vocabulary=3)

    def part(tokens: int, blocks: int) -> StepPart:
        return StepPart([7] * tokens, 16 * blocks - 1, list(range(5, 5 + blocks)))

    assert records.takes([part(1, 1)] * 4)
    assert not records.takes([part(1, 1)] * 5)
    assert not records.takes([part(1, 1), part(2, 1)])
    assert records.takes([part(1, 128)])
    assert not records.takes([part(1, 129)])
    shapes.clear()
    assert records.logits([part(1, 1)] * 3).tolist() == [[7.0, 15.0, 5.0]] * 3
    several = records.logits([part(1, 1)] * 3)
    one = records.logits([part(1, 65)])
    assert one.data_ptr() == several.data_ptr()  # no record keeps logits of its own
    assert one.tolist() == [[7.0, 16.0 * 65 - 1, 5.0]]
    assert shapes == [(4, 64), (4, 64), (1, 128)]


def test_prompts_of_all_sizes_are_computed_before_the_first_client(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    init = TextModel.__init__

    def watched(model: TextModel, *given: Any, **named: Any) -> None:
        init(model, *given, **named)
        hidden_states = model.hidden_states

        def noted(
            embeddings: Tensor,
            keys: Tensor,
            values: Tensor,
            rows: Rows,
            wanted: Tensor | None = None,
        ) -> Tensor:
            computed.append(len(embeddings))
            return hidden_states(embeddings, keys, values, rows, wanted)

        model.hidden_states = noted

    monkeypatch.setattr(TextModel, "__init__", watched)
    start(record=True, prefill_chunk_tokens=300)
    assert computed == [2, 16, 64, 256]
    computed.clear()
    start()
    assert computed == []  # without graphs there are no kernels to be compiled


def test_a_device_that_does_not_run_the_kernels_is_an_error_when_the_model_loads(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OutOfResourcesError(Exception):
        """As Triton's own, no RuntimeError."""

    fails = mock.Mock(side_effect=OutOfResourcesError("out of resource: shared memory"))
    monkeypatch.setattr(TextModel, "logits", fails)
    with pytest.raises(RuntimeError, match="do not run on cpu: out of resource: shared memory"):
        start(record=True)


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU here to record CUDA graphs on; the same shapes run unrecorded on the CPU above",
)
def test_on_a_gpu_a_recorded_step_equals_one_that_is_not(checkpoint: Path) -> None:
    answers = []
    for record in (True, False):
        harness = EngineHarness(checkpoint, record=record, dtype="bfloat16", device="cuda")
        try:
            with harness.held_device():  # so that both share the same steps, recorded or not
                asked = [
                    long_ask(word).submit(harness, word, start=True) for word in ("red", "blue")
                ]
            answers.append([each.wait()[0] for each in asked])
        finally:
            harness.shutdown()
    assert answers[0] == answers[1]
