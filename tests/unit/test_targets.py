"""What people wait for, on devices of known costs: first tokens, and the time between tokens."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import pytest

from llava_triton.contract.settings import Settings
from llava_triton.engine.scheduler import INTERVAL_GROWTH
from llava_triton.kernels.base import BLOCK_TOKENS
from tests.simulated_device import Arrival, Cost, SimulatedDevice, Told, cpu, gpu

TARGET = Settings().target_between_tokens_ms / 1000.0
PATIENCE = Settings().target_first_token_ms / 1000.0
OPENING = 300
QUESTION = 30
TOLERANCE = 1.2
"""Of single steps: estimates follow what happens."""
BESIDE_QUESTIONS = 1.3
"""Where questions have steps of their own."""
USUAL = 1.05
"""Of nearly all."""


def slow_cpu(answers: int, prompt_tokens: int) -> float:
    """A machine on which answers alone take longer than the target."""
    return 5.0 * cpu(answers, prompt_tokens)


def device(cost: Cost, **options: Any) -> SimulatedDevice:
    """One that has answered a picture and some questions, and is idle."""
    on_gpu = cost is gpu
    made = SimulatedDevice(cost, ahead=on_gpu, chunk=1024 if on_gpu else 512, **options)
    made.run([Arrival(float(number), OPENING, 8) for number in range(3)])
    return made


def streams(count: int, answer: int = 500) -> list[Arrival]:
    """Long answers to short questions."""
    return [Arrival(0.0, QUESTION, answer) for _ in range(count)]


def bound(cost: Cost, answers: int) -> float:
    """Seconds that may pass between two tokens of so many answers."""
    return max(TARGET, INTERVAL_GROWTH * cost(answers, 0))


def assert_intervals_are_bounded(
    told: Sequence[Told], cost: Cost, answers: int, since: float = 0.0, usual: float = USUAL
) -> None:
    intervals = sorted(each for one in told for each in one.intervals(begin=since))
    most = bound(cost, answers)
    assert intervals[-1] <= max(TOLERANCE, usual) * most
    assert intervals[int(0.95 * len(intervals))] <= usual * most


@pytest.mark.parametrize("cost", [cpu, gpu, slow_cpu])
def test_sixteen_openings_at_once(cost: Cost) -> None:
    told = device(cost).run([Arrival(0.0, OPENING) for _ in range(16)])
    assert_intervals_are_bounded(told, cost, 16)
    waits = [each.wait for each in told]
    assert waits == sorted(waits)  # oldest first
    # Answers take half of the time where the target is out of reach. Small steps cost the rest.
    arithmetic = 16 * cost(0, OPENING)
    assert waits[-1] <= (3.0 if cost is slow_cpu else 1.7) * arithmetic
    assert statistics.median(waits) <= 0.75 * waits[-1]


def test_conversations_do_not_pay_for_those_that_begin() -> None:
    """Sixteen begin at once; who has his first answer asks on while others wait for theirs."""
    turns = 8

    def follow(told: Told) -> Arrival | None:
        asked = counts[told.arrival.session] = counts.get(told.arrival.session, 0) + 1
        if asked == turns:
            return None
        return Arrival(told.times[-1], QUESTION, session=told.arrival.session)

    counts: dict[int, int] = {}
    openings = [Arrival(0.0, OPENING, session=number) for number in range(16)]
    told = device(cpu).run(openings, follow)
    assert len(told) == 16 * turns
    later = sorted(each.wait for each in told if each.arrival.prompt == QUESTION)
    # About the question itself and the step of answers before it.
    assert statistics.median(later) <= 2.0 * cpu(0, QUESTION)
    assert later[int(0.95 * len(later))] <= 2.0 * TARGET


@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize("cost", [cpu, gpu, slow_cpu])
def test_streams_beside_one_long_opening(cost: Cost, count: int) -> None:
    came = 3.0 if cost is not slow_cpu else 15.0
    told = device(cost).run([*streams(count), Arrival(came, 3000, 4)])
    assert_intervals_are_bounded(told, cost, count + 1, since=came)
    long = told[-1]
    assert long.wait <= 3 * cost(0, 3000)
    # As much is computed as may be: the answers do not run faster than they must.
    during = [
        each for one in told[:-1] for each in one.intervals(came + 0.2 * long.wait, long.times[0])
    ]
    if cost is not gpu:  # there the whole prompt is done in a few steps
        assert statistics.median(during) >= 0.9 * bound(cost, count)


@pytest.mark.parametrize("cost", [cpu, gpu])
def test_many_short_questions_beside_a_long_opening(cost: Cost) -> None:
    questions = [Arrival(3.01 + 0.17 * number, QUESTION, 8) for number in range(40)]
    told = device(cost).run([*streams(8), Arrival(3.0, 3000, 4), *questions])
    assert_intervals_are_bounded(told, cost, 10, since=3.0, usual=BESIDE_QUESTIONS)
    by_prompt = {each.arrival.prompt: each for each in told}
    assert by_prompt[3000].wait <= PATIENCE + 4 * cost(0, 3000)
    waits = sorted(each.wait for each in told if each.arrival.at > 3.0)
    assert statistics.median(waits) <= 3 * TARGET
    assert waits[-1] <= 6 * TARGET


@pytest.mark.parametrize("cost", [cpu, slow_cpu])
def test_questions_go_first_on_slow_machines_too(cost: Cost) -> None:
    """Also where one takes longer than the time between two tokens."""
    came = 3.0 if cost is cpu else 15.0
    openings = [Arrival(came, OPENING, 4) for _ in range(8)]
    told = device(cost).run([*streams(8), *openings, Arrival(came + 0.01, 60, 4)])
    assert told[-1].wait <= 4 * bound(cost, 8)
    assert_intervals_are_bounded(told, cost, 9, since=came, usual=BESIDE_QUESTIONS)


@pytest.mark.parametrize("cost", [cpu, gpu])
def test_an_opening_is_never_starved_by_questions(cost: Cost) -> None:
    """As many questions as are answered, and more, for as long as the opening waits."""
    every = cost(0, QUESTION)
    questions = [Arrival(1.0 + every * number, QUESTION, 2) for number in range(1500)]
    told = device(cost).run([Arrival(1.0, 1500, 4), *questions])
    opening = next(each for each in told if each.arrival.prompt == 1500)
    last = told[-1]
    assert opening.wait <= PATIENCE + 5 * cost(0, 1500)
    assert opening.times[0] < last.arrival.at, "it was computed when the questions had ended"


def test_how_long_an_opening_stands_back_is_what_the_setting_says() -> None:
    def wait(patience_ms: float) -> float:
        questions = [Arrival(1.0 + 0.04 * number, QUESTION, 2) for number in range(200)]
        made = device(cpu, target_first_token_ms=patience_ms)
        return made.run([Arrival(1.0, 1500, 4), *questions])[0].wait

    assert wait(100.0) < wait(2000.0) < wait(1_000_000.0)


@pytest.mark.parametrize("target_ms", [30.0, 50.0, 120.0])
def test_the_time_between_tokens_is_what_the_setting_says(target_ms: float) -> None:
    made = device(cpu, target_between_tokens_ms=target_ms)
    told = made.run([*streams(2), Arrival(2.0, 3000, 4)])
    long = told[-1]
    during = [each for one in told[:2] for each in one.intervals(2.2, long.times[0])]
    expected = max(target_ms / 1000.0, INTERVAL_GROWTH * cpu(2, 0))
    assert 0.85 * expected <= statistics.median(during) <= expected


@pytest.mark.parametrize("cost", [cpu, gpu])
def test_without_prompts_answers_run_as_fast_as_they_can(cost: Cost) -> None:
    made = device(cost)
    told = made.run(streams(4))
    assert max(told[-1].intervals()) == pytest.approx(cost(4, 0))


def test_a_machine_that_stumbles_goes_on_as_before() -> None:
    """Every 40th step takes ten times as long."""
    steps = 0

    def stumbling(answers: int, prompt_tokens: int) -> float:
        nonlocal steps
        steps += 1
        return cpu(answers, prompt_tokens) * (10.0 if steps % 40 == 0 else 1.0)

    made = device(stumbling)
    told = made.run([*streams(8), Arrival(3.0, 3000, 4)])
    long = told[-1]
    intervals = sorted(each for one in told[:-1] for each in one.intervals(3.0, long.times[0]))
    assert statistics.median(intervals) == pytest.approx(TARGET, rel=0.15)
    assert intervals[int(0.9 * len(intervals))] <= TOLERANCE * TARGET
    # Nor does the prompt wait because of them, beyond what they take themselves.
    stumbled = sum(seconds for _, _, seconds in made.steps if seconds > 3 * TARGET)
    assert long.wait <= 2.5 * cpu(0, 3000) + stumbled


def test_on_a_gpu_prompts_do_not_cost_the_overlap() -> None:
    made = device(gpu)
    before, ahead = len(made.steps), made.planned_ahead
    made.run([*streams(8), Arrival(1.0, 3000, 4), *(Arrival(1.1, QUESTION) for _ in range(8))])
    # All but the first step, and the one behind an idle moment.
    assert made.planned_ahead - ahead >= len(made.steps) - before - 2


def test_on_a_gpu_chunks_are_large_and_questions_whole() -> None:
    """Below some hundred rows a step takes as long, whatever it computes."""
    made = device(gpu)
    before = len(made.steps)
    made.run([*streams(16), Arrival(2.0, 3000, 4), Arrival(3.0, 250, 4)])
    chunks = [tokens for answers, tokens, _ in made.steps[before:] if answers and tokens]
    assert min(chunks) >= 250
    assert chunks[-1] == 250  # in one step


def test_on_a_cpu_a_question_has_a_step_of_its_own_and_answers_the_next() -> None:
    made = device(cpu)
    before = len(made.steps)
    made.run([*streams(4), *(Arrival(1.0, QUESTION, 1) for _ in range(6))])
    steps = [step for step in made.steps[before:] if step[1]][1:]
    assert [answers for answers, _, _ in steps].count(0) >= 3
    first = made.steps.index(steps[0])
    for (answers, _, _), (following, _, _) in zip(
        made.steps[first:], made.steps[first + 1 :], strict=False
    ):
        assert answers or following, "running answers waited for two steps of questions"


def test_where_nothing_runs_the_oldest_prompt_is_computed_by_itself() -> None:
    """Beside another it would only get its first token later."""
    made = device(cpu)
    before = len(made.steps)
    made.run([Arrival(0.0, OPENING, 1) for _ in range(3)])
    assert [tokens for _, tokens, _ in made.steps[before:]] == [OPENING] * 3
    made.run([Arrival(0.0, QUESTION, 1), Arrival(0.0, QUESTION - 10, 1)])
    assert made.steps[-1][1] == QUESTION + QUESTION - 10  # they take no time to speak of


def test_an_older_prompt_that_has_all_blocks_goes_on() -> None:
    """The younger answer finds none, so that a step of answers alone would have nothing to do."""
    made = SimulatedDevice(cpu, blocks=2000 // BLOCK_TOKENS + 2)
    told = made.run([Arrival(0.0, 2000, 4), Arrival(0.1, QUESTION, 60)])
    assert [len(each.times) for each in told] == [4, 60]
    old, young = told
    assert young.times[0] < old.times[0] < young.times[-1]
