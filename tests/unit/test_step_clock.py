"""How many prompt tokens go beside running answers, on devices whose costs are known."""

from __future__ import annotations

import pytest

from llava_triton.engine.step_clock import STEPS_UNTIL_A_LOOK, StepClock
from tests.simulated_device import Cost, cpu, gpu

ANSWERS = 16
LIMIT = 0.05


def seen_alone(cost: Cost, *prompts: int) -> StepClock:
    """A clock that has seen such prompts alone, and the answers alone."""
    clock = StepClock()
    for tokens in prompts:
        clock.observe(0, tokens, cost(0, tokens))
    for _ in range(2):
        clock.observe(ANSWERS, 0, cost(ANSWERS, 0))
    return clock


def mixed_steps(clock: StepClock, cost: Cost, steps: int, growth: float = 0.0) -> list[float]:
    """Seconds of steps filled with prompts, whose answers get slower by `growth` with each."""
    took = []
    for number in range(steps):
        tokens = max(1, min(4096, clock.tokens_beside(LIMIT)))
        took.append(cost(ANSWERS, tokens) + number * growth)
        clock.observe(ANSWERS, tokens, took[-1])
    return took


@pytest.mark.parametrize("cost", [cpu, gpu])
@pytest.mark.parametrize("prompt", [24, 300, 1000])
def test_steps_come_to_take_the_time_there_is_and_not_more(cost: Cost, prompt: int) -> None:
    took = mixed_steps(seen_alone(cost, prompt), cost, 40)
    assert max(took) <= 1.2 * LIMIT  # the first: it has not seen that a chunk costs more
    assert max(took[2:]) <= 1.02 * LIMIT
    assert min(took[10:]) >= 0.9 * LIMIT


@pytest.mark.parametrize("factor", [0.1, 0.5, 3.0, 10.0])
@pytest.mark.parametrize("cost", [cpu, gpu])
def test_a_wrong_estimate_is_corrected_within_some_steps(cost: Cost, factor: float) -> None:
    clock = seen_alone(lambda answers, tokens: factor * cost(answers, tokens), 300)
    clock.observe(ANSWERS, 0, cost(ANSWERS, 0))
    took = mixed_steps(clock, cost, 30)
    assert max(took[6:]) <= 1.05 * LIMIT
    assert min(took[20:]) >= 0.9 * LIMIT


@pytest.mark.parametrize("cost", [cpu, gpu])
def test_answers_that_get_slower_leave_prompts_less_time(cost: Cost) -> None:
    took = mixed_steps(seen_alone(cost, 300), cost, 100, growth=0.0001)
    assert max(took) <= 1.2 * LIMIT  # the first: it has not seen that a chunk costs more
    assert max(took[10:]) <= 1.03 * LIMIT


@pytest.mark.parametrize("cost", [cpu, gpu])
def test_a_slow_step_changes_nothing(cost: Cost) -> None:
    clock = seen_alone(cost, 300)
    mixed_steps(clock, cost, 20)
    before = clock.decode_seconds, clock.tokens_alone(LIMIT), clock.tokens_beside(LIMIT)
    clock.observe(ANSWERS, 0, 40 * cost(ANSWERS, 0))
    clock.observe(0, 300, 40 * cost(0, 300))
    clock.observe(ANSWERS, before[2], 40 * LIMIT)
    alone = clock.tokens_alone(LIMIT)
    assert (clock.decode_seconds, clock.tokens_beside(LIMIT)) == (before[0], before[2])
    # Of two measurements the slower one may be the right one; of three it is left out.
    clock.observe(0, 300, cost(0, 300))
    clock.observe(0, 300, cost(0, 300))
    assert alone <= before[1] == clock.tokens_alone(LIMIT)


def test_answers_are_measured_alone_first_and_now_and_then() -> None:
    clock = StepClock()
    assert clock.takes_look(1)
    assert clock.takes_look(1)  # it has not been done yet
    clock.observe(1, 0, 0.01)
    looks = [clock.takes_look(1) for _ in range(3 * (STEPS_UNTIL_A_LOOK + 1))]
    assert looks == ([False] * STEPS_UNTIL_A_LOOK + [True]) * 3
    assert [clock.takes_look(count) for count in (2, 3, 6, 6, 7, 2, 2)] == [
        *(False, True, False, False, True, True, False)
    ]


def test_a_short_prompt_waits_for_the_regular_measurement_only() -> None:
    clock = StepClock()
    clock.observe(1, 0, 0.01)
    assert not clock.takes_look(4, hurry=True)
    assert clock.takes_look(4)
    looks = [clock.takes_look(9, hurry=True) for _ in range(STEPS_UNTIL_A_LOOK + 1)]
    assert looks == [False] * STEPS_UNTIL_A_LOOK + [True]


def test_small_prompts_alone_are_taken_for_what_such_cost() -> None:
    clock = seen_alone(cpu, 300)
    assert clock.alone_seconds(30) < cpu(0, 30)  # by the token, as the large one
    clock.observe(0, 28, cpu(0, 28))
    assert clock.alone_seconds(30) == pytest.approx(cpu(0, 30), rel=0.05)
    assert clock.alone_seconds(300) == pytest.approx(cpu(0, 300))


def test_nothing_is_known_before_anything_was_seen() -> None:
    clock = StepClock()
    assert (clock.tokens_alone(1.0), clock.tokens_beside(1.0)) == (0, 0)
    assert (clock.alone_seconds(9), clock.decode_seconds) == (0.0, 0.0)
