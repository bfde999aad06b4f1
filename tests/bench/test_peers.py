"""`make bench-peers`: its tables, from small figures, and peers that fail. No peer is needed."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from benchmarks import processes
from benchmarks.load import Answer, Ask, Load, TurnTimes, Way, hold, write_loads
from benchmarks.peers import __main__ as command
from benchmarks.peers.play import Conversation
from benchmarks.peers.report import comparisons, equal_replies, report
from benchmarks.script import Script, turn_text
from benchmarks.workload import Workload
from demo.random_checkpoint import DEMO
from llava_triton.contract.delta import Delta
from tests.bench.test_benchmarks import cells_of


def load(
    sessions: int,
    first: float,
    later: float = 10.0,
    seconds: float = 1.0,
    text: str = "red",
    others: float = 0.0,
) -> Load:
    turns = [
        TurnTimes(session, turn, later if turn else first, 5.0, 32, 0, 300, text)
        for session in range(sessions)
        for turn in range(3)
    ]
    return Load(sessions, seconds, 100.0, turns, others_cores=others)


def test_ratios_are_to_the_best_peer_of_each_pass() -> None:
    rounds = [
        {"E": [load(16, 700, seconds=1)], "V": [load(16, 1000)], "O": [load(16, 900, seconds=2)]},
        {"E": [load(16, 700, seconds=1)], "V": [load(16, 800, seconds=2)], "O": [load(16, 1200)]},
    ]
    judged = {each.verdict.text: each for each in comparisons(rounds)}
    first = judged["first turn's first token, 16 at once, E / O or V"]
    assert (first.ours, first.best, first.others) == (700, 850, ("O", "V"))
    assert first.verdict.least == pytest.approx(700 / 900)
    assert first.verdict.most == pytest.approx(700 / 800)
    assert first.verdict.met is False
    # The best of tokens per second is the highest.
    rate = judged["tokens per second, 16 at once, E / V or O"]
    assert (rate.verdict.value, rate.verdict.met) == (1.0, False)
    assert not any(each.way in ("E16", "E8", "T") for each in judged.values())


def test_what_reaches_its_bar_says_yes() -> None:
    rounds = [
        {
            "E16": [load(16, 800)],
            "T16": [load(16, 950, later=11.0)],
            "V16": [load(16, 1000, later=40.0)],
            "V": [load(16, 100)],  # another precision
        }
    ]
    judged = {each.verdict.text: each.verdict.met for each in comparisons(rounds)}
    assert judged == {
        "first turn's first token, 16 at once, E16 / V16": True,
        "first turn's first token (95th), 16 at once, E16 / V16": True,
        "later turns' first token, 16 at once, E16 / V16": True,
        "tokens per second, 16 at once, E16 / V16": False,
        "later turns' first token, 16 at once, T16 / E16": True,
        "tokens per second, 16 at once, T16 / E16": True,
    }


def test_replies_are_compared_within_a_precision() -> None:
    other = load(4, 1)
    other.turns[0] = dataclasses.replace(other.turns[0], text="blue")
    rounds = [
        {"K": [load(1, 1)], "E": [load(1, 1), load(4, 1)], "V": [load(1, 1), other]},
        {"K": [load(1, 1)], "V": [load(1, 1, text="green")], "O16": [load(1, 1)]},
    ]
    # K has not held 4 sessions: there E's replies are what V's should be.
    assert equal_replies(rounds) == {"E": (3, 3), "V": (14, 18)}


def test_the_tables_show_drift_disturbance_and_failures() -> None:
    rounds = [
        {"E": [load(4, 1234, later=20.0)], "V": [load(4, 2000, later=100.0)]},
        {"E": [load(4, 1500, later=20.0, others=0.2)], "V": [load(4, 2500, later=50.0)]},
    ]
    titles = {"E": "engine", "V": "vLLM, float32", "O": "OpenVINO, float32"}
    why = "ImportError: libgone.so\nAll it said is in a.log."
    told, values = report(rounds, titles, {"O": why})
    lines = [cells_of(line) for line in told.splitlines()]
    figures = ["1,234-1,500", "1,234-1,500", "20", "20", "5.0", "384", "0.20 *"]
    assert ["E", "engine", "4", *figures] in lines
    assert ["O", "OpenVINO, float32: ImportError: libgone.so", *["-"] * 8] in lines
    assert f"O was not measured: {why}\n" in told
    assert "V 18 of 24 (75 %)" not in told
    assert "V 24 of 24 (100 %)." in told
    compared = "later turns' first token, 4 at once, E / V"
    assert [compared, "20", "75", "0.30", "0.20-0.40", "<= 0.4", "yes *"] in lines
    (target,) = [each for each in values["targets"] if each["text"] == compared]
    assert (target["ours"], target["best"], target["met"]) == (20, 75, True)
    assert [row["way"] for row in values["rows"]] == ["E", "V"]
    assert values["failed"] == {"O": why}
    others = {(each["pass"], each["way"]): each["others_cores"] for each in values["passes"]}
    assert others == {(1, "E"): 0.0, (1, "V"): 0.0, (2, "E"): 0.2, (2, "V"): 0.0}
    assert "*" not in report(rounds[:1], titles, {})[0].partition("\n\nRatios")[0]


class StubBench:
    """Instead of `Bench`: nothing is exported, because nothing of ours is measured."""

    def __init__(self, folder: Path, sessions: list[int], *, quick: bool) -> None:
        self.checkpoint = folder / "checkpoint"
        self.checkpoint.symlink_to(DEMO)

    def prepare(self, ways: list[str]) -> None:
        assert ways == []

    def workload(self, way: str) -> Workload:
        return Workload(str(self.checkpoint), "none", turns=3)

    def about(self, ways: list[str]) -> dict[str, Any]:
        return {"device": "d", "date": "2026-11-27", "commit": None, "geometry": "quick"} | (
            dict.fromkeys(("torch", "transformers", "python"), "1")
        )


FAKE = """
import json, subprocess, sys
given = dict(zip(sys.argv[3::2], sys.argv[4::2]))
script = json.load(open(given["--script"]))
if script["dtype"] == "bfloat16":
    left = subprocess.Popen(["sleep", "1000"])
    open(RECORDED + ".pid", "w").write(str(left.pid))
    print("Traceback of something long", file=sys.stderr)
    print("RuntimeError: this processor has no bfloat16", file=sys.stderr)
    sys.exit(1)
assert len(script["questions"]["1-0"]) == 3
assert open(script["pictures"]["1-0"], "rb").read(4)[1:] == b"PNG"
print("1 at once: 96.0 tokens/s")
open(given["--output"], "w").write(open(RECORDED).read())
"""


def test_peers_that_fail_are_named_with_their_cause_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = tmp_path / "recorded.json"
    write_loads(recorded, [load(1, 300.0)])
    fake = tmp_path / "fake.py"
    fake.write_text(f"RECORDED = {str(recorded)!r}\n{FAKE}")
    python = tmp_path / ".venv-vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{fake}' \"$@\"\n")
    python.chmod(0o755)
    (tmp_path / ".venv-vllm" / "installed").touch()
    (tmp_path / ".venv-openvino").mkdir()
    messages = tmp_path / ".venv-openvino" / "pip-messages"
    messages.write_text("WARNING: slow\nERROR: No matching distribution found for openvino\n")
    monkeypatch.setattr(command, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(command, "ORDER", ("V", "V16", "O", "O16"))
    monkeypatch.setattr(command, "Bench", StubBench)
    output = tmp_path / "out" / "peers.json"
    options = ["--peers", "vllm", "openvino", "--sessions", "1", "--passes", "2"]
    assert command.main([*options, "--output", str(output)]) == 0
    told = capsys.readouterr().out
    values = json.loads(output.read_text())
    assert list(values["failed"]) == ["O", "O16", "V16"]
    missing = "openvino is not installed: No matching distribution found for openvino"
    assert values["failed"]["O"] == missing
    assert f"O (OpenVINO, float32) is left out: {missing}\n" in told
    cause, log = values["failed"]["V16"].splitlines()
    assert cause == "RuntimeError: this processor has no bfloat16"
    assert "Traceback of something long" in (output.parent / "peers-V16.log").read_text()
    assert str(output.parent / "peers-V16.log") in log
    assert f"| V16 | vLLM, bfloat16: {cause}" in output.with_suffix(".txt").read_text()
    # What had failed was not tried again, and what it had left running was ended.
    assert told.count("V16 (vLLM, bfloat16): [1] at once") == 1
    assert not processes.is_running(int(Path(f"{recorded}.pid").read_text()))
    assert [(row["way"], row["rounds"]) for row in values["rows"]] == [("V", 2)]
    assert told.count("1 at once: 96.0 tokens/s") == 2
    assert (output.parent / "peers-openings.png").stat().st_size > 10_000


def test_a_script_says_what_the_workload_says(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.symlink_to(DEMO)
    workload = Workload(str(checkpoint), "none", turns=2)
    Script.of_workload(workload, "bfloat16", [1, 2]).write(tmp_path / "script.json")
    script = Script.read(tmp_path / "script.json")
    assert (script.turns, script.answer_tokens, script.dtype) == (2, 32, "bfloat16")
    for count, session in [(0, 0), (1, 0), (2, 0), (2, 1)]:
        assert script.picture(count, session) == workload.picture(count, session)
        for turn in range(2):
            assert script.question(count, session, turn) == workload.question(count, session, turn)


def test_turns_are_rendered_as_the_chat_template_does() -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO)
    picture = {"type": "image"}
    messages = [
        {"role": "user", "content": [picture, {"type": "text", "text": "What is red?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A circle."}]},
        {"role": "user", "content": [{"type": "text", "text": "And blue?"}]},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    said = Conversation(Tokenizer.from_file(str(DEMO / "tokenizer.json")))
    said.add_question(Ask("a", start=True, text="What is red?"))
    answer = tokenizer(" A circle.", add_special_tokens=False)["input_ids"]
    assert said.add_answer(answer) == "A circle."
    prompt = said.add_question(Ask("a", text="And blue?"))
    assert prompt == tokenizer("<s>" + rendered, add_special_tokens=False)["input_ids"]
    assert turn_text("red", start=True, image_tokens=2) == "<s>USER: <image><image>\nred ASSISTANT:"


def test_whoever_is_kept_waiting_for_the_others_has_waited() -> None:
    class OneByOne(Way):
        """Needs a second for an answer, and answers within `ask`."""

        def __init__(self) -> None:
            self.now = 0.0

        def ask(self, ask: Ask, answer: Answer | None = None) -> Answer:
            answer = answer or Answer()
            self.now = (self.now or answer.asked_at) + 1.0
            answer.take(Delta("a", "length", 20, 1, 4, 1.0), self.now)
            answer.end()
            return answer

        def close(self) -> None:
            """Nothing to do."""

    workload = Workload(str(DEMO), "none", turns=2, answer_tokens=1)
    held = hold(OneByOne(), workload, load=2, sessions=2, turns=2)
    waited = {(each.session, each.turn): each.first_token_ms for each in held.turns}
    assert waited == pytest.approx({(0, 0): 1e3, (1, 0): 2e3, (0, 1): 2e3, (1, 1): 2e3})


def test_what_this_program_uses_is_not_others(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, own, now = iter([100.0, 119.0]), iter([5.0, 20.0]), iter([1.0, 11.0])

    class Own:
        @property
        def busy_seconds(self) -> float:
            return next(own)

    monkeypatch.setattr(processes, "busy_seconds", lambda: next(machine))
    monkeypatch.setattr(processes, "with_descendants", lambda _pid: [Own()])
    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=lambda: next(now)))
    assert processes.OtherPrograms().cores() == pytest.approx(0.4)
