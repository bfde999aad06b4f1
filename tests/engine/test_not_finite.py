"""Numbers that are none, from a vision encoder or from the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc
from torch import Tensor
from tritonclient.utils import InferenceServerException

from llava_triton.contract.errors import ErrorCode, SessionError, error_from_text
from llava_triton.engine import TurnRequest
from llava_triton.model.sampling import NO_TOKEN, Draw, next_tokens
from llava_triton.model.step import LaunchedStep, Step, StepPart
from llava_triton.model.text_model import TextModel
from tests.engine_harness import EngineHarness, Pending
from tests.small_engine import Alone, Ask, Start, failure, long_ask, show
from tests.triton import inputs


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, -1])
def test_features_that_are_not_finite_are_refused(
    start: Start, alone: Alone, value: float, place: int
) -> None:
    harness = start()
    show(0).wait(harness, "s", start=True)
    features = harness.features([*show(1).images, *show(2).images])
    features = tuple(each.clone() for each in features)
    features[place].view(-1)[place] = value
    for opens in (False, True):
        pending = Pending()
        request = TurnRequest("s", text="What is it?", image_features=features, start=opens)
        harness.engine.submit(request, pending.events.put)
        with pytest.raises(SessionError, match="image_features holds values that are not finite"):
            pending.wait()
    assert Ask("?").wait(harness, "s")[0] == alone(show(0), Ask("?"))[-1]


def test_features_that_are_not_finite_are_refused_at_the_door(grpc_client: Any) -> None:
    metadata = grpc_client.get_model_config("vision_encoder").config.output[0].dims
    features = np.full((1, *metadata), np.nan, dtype=np.float32).reshape(-1).view(np.uint8)
    tensor = tritonclient.grpc.InferInput("image_features", list(features.shape), "UINT8")
    tensor.set_data_from_numpy(features)
    lengths = tritonclient.grpc.InferInput("image_lengths", [4], "UINT8")
    lengths.set_data_from_numpy(np.array([metadata[0]], dtype=np.int32).view(np.uint8))
    with pytest.raises(InferenceServerException) as caught:
        grpc_client.infer(
            "answer_collector",
            [*inputs(tritonclient.grpc, "What is it?"), tensor, lengths],
            sequence_id="not finite",
            sequence_start=True,
        )
    told = error_from_text(caught.value.message())
    assert told.code is ErrorCode.INVALID_ARG
    assert "not finite" in told.sentence


@contextmanager
def broken_logits(
    harness: EngineHarness, value: float, is_broken: Callable[[StepPart], bool]
) -> Iterator[None]:
    """The model's logits behind some parts of steps are `value` somewhere."""
    launch = harness.runner.launch
    right, broken = TextModel.logits, list[int]()

    def noting(step: Step) -> LaunchedStep:
        broken[:] = [row for row, part in enumerate(step.parts) if is_broken(part)]
        return launch(step)

    def logits(model: TextModel, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        made = right(model, hidden, out)
        made[broken, 7] = value
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.runner, "launch", noting)
        patch.setattr(TextModel, "logits", logits)
        yield


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_end_their_turn_alone(
    start: Start, alone: Alone, value: float, temperature: float
) -> None:
    harness = start()
    for name in ("red", "green"):
        long_ask(name).wait(harness, name, start=True)
    going_on = Ask("Go on", max_tokens=60, ignore_eos=True)
    expected = {name: alone(long_ask(name), going_on)[-1] for name in ("red", "green")}
    first = harness.session("green").key_values.blocks[0]
    behind = len(harness.history("green")) + 40

    def is_broken(part: StepPart) -> bool:
        return part.blocks[0] == first and part.context + len(part.ids) == behind

    with broken_logits(harness, value, is_broken):
        neighbour = going_on.submit(harness, "red")
        more: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True, "temperature": temperature}
        doomed = harness.submit("green", "Go on", **more)
        with pytest.raises(SessionError, match="values that are not finite") as caught:
            doomed.wait()
        assert caught.value.code is ErrorCode.INTERNAL
        assert neighbour.wait()[0] == expected["red"]
    harness.check_state()
    assert harness.engine.statistics().turns_failed == 1
    assert going_on.wait(harness, "green")[0] == expected["green"]


def test_an_opening_whose_logits_are_not_finite_opens_nothing(start: Start, alone: Alone) -> None:
    harness = start()
    with broken_logits(harness, torch.nan, lambda part: True):
        assert failure(show(0).submit(harness, "s", start=True)) is ErrorCode.INTERNAL
    harness.assert_nothing_is_held()
    text, final = show(0).wait(harness, "s", start=True)
    assert text == alone(show(0))[0]
    assert final.num_cached_tokens == 0  # nothing of that step is found


def test_no_token_is_said_for_numbers_that_are_none() -> None:
    logits = torch.zeros(5, 8)
    logits[:, 3] = 1.0
    logits[1, 0], logits[2, 7], logits[3] = torch.nan, torch.inf, -torch.inf
    logits[4, 0] = -torch.inf
    greedy = next_tokens(logits, [None] * 5)
    assert greedy.tolist() == [3, NO_TOKEN, NO_TOKEN, NO_TOKEN, 3]
    drawn = next_tokens(logits, [Draw(1.0, 1, 1.0, 0.5)] * 5)
    assert drawn.tolist() == [3, NO_TOKEN, NO_TOKEN, NO_TOKEN, 3]
