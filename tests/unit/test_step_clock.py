"""How much of a prompt goes beside running answers, on a device whose speed is known."""

from __future__ import annotations

import pytest

from llava_triton.engine.step_clock import LEAST_CHUNK, STALL, StepClock

PROMPT = 2000
ANSWERS = 16


def intervals_while_a_prompt_is_computed(
    decode: float, growth: float, per_token: float
) -> list[tuple[float, float]]:
    """Steps' seconds until the prompt is computed, and what they would have been without it.

    Args:
        decode: seconds of a step of the running answers.
        growth: by how many seconds that grows with every step.
        per_token: seconds of a prompt token.
    """
    clock = StepClock()
    clock.observe(decoding=0, prompt_tokens=100, seconds=100 * 0.5 * per_token)  # large: cheap
    for _ in range(10):
        clock.observe(ANSWERS, 0, decode)
    steps: list[tuple[float, float]] = []
    left = PROMPT
    while left:
        tokens = min(left, clock.plan(ANSWERS, 512))
        seconds = decode + tokens * per_token
        clock.observe(ANSWERS, tokens, seconds)
        steps.append((seconds, decode))
        left -= tokens
        decode += growth
    return steps


@pytest.mark.parametrize("growth", [0.0, 0.0001])
def test_running_answers_are_delayed_as_planned_also_while_they_get_slower(growth: float) -> None:
    steps = intervals_while_a_prompt_is_computed(0.02, growth, per_token=0.001)
    delays = [seconds / decode for seconds, decode in steps]
    assert max(delays) <= 2 * STALL - 1  # while a token was taken for half of what it costs
    assert max(delays[10:]) <= STALL * 1.05
    # As much is computed as may be.
    per_step = (STALL - 1) * 0.02 / 0.001
    assert len(steps) <= 1.25 * PROMPT / per_step


def test_a_prompt_goes_on_however_slow_it_is() -> None:
    steps = intervals_while_a_prompt_is_computed(0.001, 0.0, per_token=0.01)
    assert len(steps) <= 1.1 * PROMPT / LEAST_CHUNK


def test_without_running_answers_a_step_takes_all_it_may() -> None:
    clock = StepClock()
    assert clock.plan(0, 512) == 512
    clock.observe(ANSWERS, 0, 0.02)
    clock.observe(0, 512, 0.5)
    assert [clock.plan(0, 512) for _ in range(100)] == [512] * 100
