"""The short form of `make fuzz`: every parser takes or refuses what nobody would write."""

from __future__ import annotations

import pytest

from llava_triton.contract import protocol
from tests.fuzz.mutation import mutations
from tests.fuzz.targets import Target, targets

TARGETS = targets()
INPUTS = 6000
"""Of all parsers together."""


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", TARGETS)
def test_parsers_refuse_or_take(name: str) -> None:
    target = TARGETS[name]
    expected = [target.run(seed) for seed in target.seeds]
    for data in mutations(target.seeds, int(INPUTS * target.share), seed=len(name)):
        target.run(data)
    assert [target.run(seed) for seed in target.seeds] == expected


def test_a_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fragile(*_: object) -> None:
        raise KeyError("temperature")

    target = TARGETS["requests"]
    monkeypatch.setattr(protocol, "parse_turn", fragile)
    with pytest.raises(AssertionError, match="500"):
        run_all(target)


def run_all(target: Target) -> None:
    for seed in target.seeds:
        target.run(seed)
