"""`make bench` and `make soak`, in short forms, and the judgement they end with."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import bench
from benchmarks.doors import DOORS
from benchmarks.fairness import Fairness, summarize_fairness
from benchmarks.findings import Verdict, table, verdict_table
from benchmarks.load import Answer, Ask, Load, TurnTimes, Way, check_complete, hold
from benchmarks.process_watch import ProcessWatch, Sample, growths
from benchmarks.processes import device_memory_mib
from benchmarks.references import Transformers, TransformersWay
from benchmarks.report import report, rows, verdicts
from benchmarks.soak import run_clients
from benchmarks.soak_clients import EVERY_KIND, FATES, Clients, Tally
from benchmarks.workload import QUICK, Workload, write_checkpoint
from demo.random_checkpoint import DEMO
from llava_triton.contract.delta import Delta
from tests.conftest import ROOT


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_bench_measures_all_ways_side_by_side(tmp_path: Path) -> None:
    output = tmp_path / "bench of a test.json"
    told = run("benchmarks.bench", "--quick", "--output", str(output))
    values = json.loads(output.read_text())
    measured = {(row["way"], row["sessions"]) for row in values["rows"]}
    assert measured == {
        *(("S", 1), ("K", 1), ("E", 1), ("E", 4)),
        *(("T", 1), ("T", 4), ("E16", 1), ("E16", 4), ("E8", 1), ("E8", 4)),
        *(("E4", 1), ("E4", 4)),
    }
    told_rows = [cells_of(line)[:3] for line in told.splitlines()]
    for row in values["rows"]:
        assert [row["way"], row["title"], str(row["sessions"])] in told_rows
        for metric in ("first_token_first_turn_ms", "first_token_later_turns_ms", "peak_mib"):
            assert row[metric] > 0, row
        assert row["tokens_per_second"] > 0
    # Greedy in float32: every way computes the same.
    equal = values["equal_answers"]
    assert {way: equal[way] for way in "SKET"} == dict.fromkeys("SKET", "3 of 3")
    assert values["fairness"]["E"][0]["prompt_tokens"] >= 500
    assert set(values["growth"]) == {"E", "E16", "E8", "E4"}
    for points in values["growth"].values():
        assert [point["idle_sessions"] for point in points] == [0, 0, 1, 50]
        assert 100 < points[0]["context"] == points[2]["context"] < 300 < points[1]["context"]
        for point in points:
            assert 0 < point["first_token_ms"] <= point["first_token_95_ms"]
    assert "A later turn's first token, ms, median / 95th" in told
    texts = [target["text"] for target in values["targets"]]
    assert "later first token, E / K" in texts
    assert "later first token of T, around engine, ms" in texts
    for target in values["targets"]:
        assert target["least"] <= target["value"] <= target["most"]
        assert target["text"] in told
    for row, far in zip(values["rows"], values["distances"], strict=True):
        assert (far["way"], far["sessions"]) == (row["way"], row["sessions"])
        assert row["first_token_by_turn_ms"][0] == row["first_token_first_turn_ms"]
        assert len(row["first_token_by_turn_ms"]) == 3
        # 16 tokens of the picture and 24 of the question, and the template's.
        assert 40 < row["opening_tokens"] < row["mean_context"] < 3 * 50
        assert 0 < far["decode_share"] < 1
        assert 0 < far["opening_share"] < 1
    assert set(values["limits"]) == {"float32", "bfloat16"}
    assert values["about"]["geometry"] == "quick"
    assert values["about"]["device"] in told
    for name in ("first-token", "throughput", "limits", "growth"):
        assert (tmp_path / f"bench of a test-{name}.png").stat().st_size > 10_000


def test_seven_billion_weights_are_refused_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "default_device", lambda: torch.device("cpu"))
    with pytest.raises(SystemExit):
        bench.main(["--geometry", "llava-1.5-7b"])
    assert "--geometry llava-1.5-7b needs a GPU, and torch sees none" in capsys.readouterr().err


def test_on_a_gpu_every_way_computes_in_its_half_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    ways = bench.ways_on(torch.device("cuda"))
    expected = dict.fromkeys(["S", "K", "E", "T", "E8", "E4"], "bfloat16")
    assert {name: way.dtype for name, way in ways.items()} == expected
    assert ways["K"].options == ("--kept",)
    on_cpu = bench.ways_on(torch.device("cpu"))
    assert {name for name, way in on_cpu.items() if way.dtype == "float32"} == set("SKET")


@pytest.mark.parametrize("kept", [False, True])
def test_transformers_answers_in_the_dtype_of_the_others(kept: bool, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", QUICK, torch.bfloat16)
    workload = Workload(str(checkpoint), "none", "bfloat16", turns=2, answer_tokens=4)
    reference = Transformers(checkpoint, torch.device("cpu"), torch.bfloat16)
    assert reference.model.dtype == torch.bfloat16
    held = hold(TransformersWay(reference, kept=kept), workload, load=1, sessions=1, turns=2)
    first, second = check_complete(held, workload).turns
    assert first.prompt_tokens + 4 + 24 < second.prompt_tokens < first.prompt_tokens + 4 + 24 + 9
    assert second.cached_tokens == (first.prompt_tokens + 3 if kept else 0)


def test_a_reduced_precisions_cost_and_gain_are_measured(
    demo_repository: Path, tmp_path: Path
) -> None:
    output = tmp_path / "accuracy.json"
    options = ("--quick", "--questions", "20", "--output", str(output))
    told = run("benchmarks.accuracy", "--repository", str(demo_repository), *options)
    values = json.loads(output.read_text())["precisions"]
    precisions = [
        f"{dtype}{weights}"
        for dtype in ("float32", "bfloat16")
        for weights in ("", ", int8 weights", ", int4 weights")
    ]
    assert list(values) == precisions
    assert values["float32"]["other_than_first"] == 0
    for precision, measured in values.items():
        assert measured["questions"] >= 20
        assert measured["correct"] >= 0.8 * measured["questions"]
        assert measured["between_tokens_ms"] > 0
        assert any(line.startswith(f"| {precision} ") for line in told.splitlines())
    assert output.with_suffix(".txt").read_text() in told


def test_the_adapters_cost_is_measured(tmp_path: Path) -> None:
    output = tmp_path / "adapter.json"
    told = run("benchmarks.adapter_cost", "--quick", "--rounds", "1", "--output", str(output))
    values = json.loads(output.read_text())
    for way in ("T", "A"):
        assert len(values["found"][way]["first_token_ms"]) == 3
        assert all(value > 0 for value in values["found"][way]["tokens_per_second"])
    assert f"{values['cost_ms']:.2f}" in told
    assert output.with_suffix(".txt").read_text() in told


def test_soak_holds_sessions_of_every_fate_through_every_door(tmp_path: Path) -> None:
    output = tmp_path / "soak of a test.json"
    repository = tmp_path / "repository"
    run(
        *("benchmarks.soak", "--sessions", "300", "--clients", "16"),
        *("--repository", str(repository), "--output", str(output)),
    )
    values = json.loads(output.read_text())
    assert set(values["about"]) >= {"date", "device", "commit", "torch"}
    counts = values["counts"]
    assert sum(counts[fate] for fate in FATES) == 300
    assert min(counts[fate] for fate in FATES) > 0
    assert counts["answers"] > 300
    assert min(values["answers"][door] for door in DOORS) > 0
    assert {"wrong", "lost", "hung", "dead", "error"}.isdisjoint(counts)
    assert all(values["verdict"].values())
    assert values["verdict"]["a forgotten session has expired"]
    parts = set(values["samples"][-1]["mib"])
    assert {"tritonserver", "language_model", "llava_sagemaker.adapter", "/dev/shm"} <= parts
    # 300 sessions are all warm-up.
    assert "memory is flat" not in values["verdict"]


def test_soak_stops_at_once_when_a_process_ends() -> None:
    victim = subprocess.Popen(["sleep", "1000"])
    watch = ProcessWatch(victim.pid)
    assert watch.dead() == []
    victim.kill()
    victim.wait()
    tally = Tally(None)

    class Waiting(Clients):
        """They would go on for ever."""

        running = True

    run_clients(watch, Waiting([], [], EVERY_KIND, tally, 0), tally, 1000.0)
    assert tally.counts["dead"] == 1
    assert f"sleep ({victim.pid})" in tally.sentences[0]


def load(
    sessions: int, first: float, later: float, between: float, seconds: float, around: float = 0.0
) -> Load:
    turns = [
        TurnTimes(session, turn, later if turn else first, between, 32, 0, 300, "red", around)
        for session in range(sessions)
        for turn in range(3)
    ]
    return Load(sessions=sessions, seconds=seconds, peak_mib=100.0, turns=turns)


def test_ratios_are_taken_within_a_round() -> None:
    # The machine is half as fast in the third round; each round's own ratio is 0.5.
    rounds = [
        {"K": [load(1, 100, 20, 10, 1)], "E": [load(1, 80, 10, 5, 0.5)]},
        {"K": [load(1, 100, 20, 10, 1)], "E": [load(1, 80, 10, 5, 0.5), load(16, 0, 25, 9, 1)]},
        {"K": [load(1, 200, 40, 20, 2)], "E": [load(1, 160, 20, 10, 1)]},
    ]
    judged = {verdict.text: verdict for verdict in verdicts(rounds, {})}
    later = judged["later first token, E / K"]
    assert (later.value, later.least, later.most, later.met) == (0.5, 0.5, 0.5, True)
    rate = judged["tokens/s, E / K"]
    assert (rate.value, rate.met) == (2.0, True)
    many = judged["tokens/s at 16, E / K"]
    assert (many.value, many.met) == (16.0, True)
    assert judged["later first token, E at 16 / at 1"].value == 2.5
    assert "later first token, E / S" not in judged  # S was not measured
    table = {(row.way, row.sessions): row for row in rows(rounds, {"K": "", "E": ""})}
    assert table["K", 1].first_token_later_turns_ms == 20
    assert (table["E", 1].rounds, table["E", 16].rounds) == (3, 1)


def test_the_way_through_triton_is_judged_by_itself() -> None:
    rounds = [{"T": [load(1, 100, 20, 10, 1, around=each)]} for each in (2.0, 5.0, 4.0)]
    judged = {verdict.text: verdict for verdict in verdicts(rounds, {})}
    around = judged["later first token of T, around engine, ms"]
    assert (around.value, around.least, around.most, around.met) == (4.0, 2.0, 5.0, False)


def test_a_machine_that_was_not_quiet_is_told() -> None:
    rounds = [{"K": [load(1, 100, 20, 10, 1)]}]
    told, values = report(rounds, {"K": ""}, {}, [("K in round 1", 0.3), ("E in round 1", 0.01)])
    assert "used 30 % during K in round 1.\n" in told
    assert values["used_by_others"] == {"K in round 1": 0.3, "E in round 1": 0.01}
    assert "WARNING" not in report(rounds, {"K": ""}, {}, [("K in round 1", 0.01)])[0]


def test_turns_are_kept_apart_for_the_plots() -> None:
    def of(*times: float) -> Load:
        turns = [
            TurnTimes(session, turn, time + session, 5.0, 10, 0, 100 + 50 * turn, "red")
            for session in range(3)
            for turn, time in enumerate(times)
        ]
        return Load(3, 1.0, 100.0, turns, device_peak_mib=times[0])

    (row,) = rows([{"E": [of(90, 20, 30)]}, {"E": [of(70, 24, 30)]}], {"E": ""})
    assert row.first_token_by_turn_ms == [81, 23, 31]
    assert row.mean_context == 155
    assert row.opening_tokens == 100
    assert row.device_peak_mib == 90


def test_a_gpus_memory_has_a_column_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device_memory_mib() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 17321\necho 5\n")
    tool.chmod(0o755)
    assert device_memory_mib() == 17321.0
    held = load(1, 100, 20, 10, 1)
    used = dataclasses.replace(held, device_peak_mib=17321.0)
    assert "GPU, MiB" in (told := report([{"K": [used]}], {"K": ""}, {})[0])
    assert " 17321 |\n" in told
    assert "GPU, MiB" not in report([{"K": [held]}], {"K": ""}, {})[0]


def test_fairness_looks_at_the_time_of_the_long_prompt_alone() -> None:
    streams = [[0.00, 0.01, 0.02, 0.03, 0.07, 0.08, 0.5], [0.00, 0.01, 0.02, 0.04, 0.05, 0.06, 0.9]]
    measured = summarize_fairness(
        streams, came=0.035, computed=0.065, prompt_tokens=2000, target_ms=50.0, largest_piece=1
    )
    assert measured.usual_ms == pytest.approx(10.0)
    assert measured.usual_largest_ms == pytest.approx(10.0)
    assert measured.stalled_largest_ms == pytest.approx(840.0)  # it began in that time
    with pytest.raises(RuntimeError, match="make them longer"):
        summarize_fairness(
            streams, came=0.035, computed=0.6, prompt_tokens=1, target_ms=50.0, largest_piece=1
        )


def test_one_disturbed_round_does_not_judge_fairness() -> None:
    fair = Fairness(
        streams=16,
        prompt_tokens=2000,
        usual_ms=20.0,
        usual_largest_ms=22.0,
        stalled_median_ms=30.0,
        stalled_95_ms=45.0,
        stalled_largest_ms=70.0,
        prompt_first_token_ms=4000.0,
        target_ms=50.0,
        largest_piece_tokens=1,
    )
    disturbed = dataclasses.replace(fair, stalled_95_ms=90.0)
    measured = {"E": [dataclasses.asdict(each) for each in (fair, disturbed, fair)]}
    (judged,) = verdicts([{}], measured)
    assert (judged.value, judged.least, judged.most, judged.met) == (0.9, 0.9, 1.8, True)
    told, values = report([{"E": [load(1, 100, 20, 10, 1)]}], {"E": ""}, measured)
    assert "after 4000 ms, 30.0 ms (95th 45.0, largest 70.0).\n" in told
    assert values["fairness"] == measured
    measured["E"].append(measured["E"][1])
    measured["E"].append(measured["E"][1])
    assert not verdicts([{}], measured)[0].met
    # Where answers alone take longer than half of the target, twice that is allowed.
    slow = dataclasses.replace(fair, usual_ms=45.0, stalled_95_ms=85.0)
    assert verdicts([{}], {"E": [dataclasses.asdict(slow)]})[0].met


def test_tables_show_whom_the_median_hides() -> None:
    turns = [
        TurnTimes(session, turn, 100.0 * (session + 1), 5.0 + session, 32, 0, 300, "red")
        for session in range(20)
        for turn in range(2)
    ]
    held = Load(20, 1.0, 100.0, turns)
    (row,) = rows([{"E": [held]}, {"E": [held]}], {"E": "engine"})
    assert (row.first_token_first_turn_ms, row.first_token_first_turn_95_ms) == (1050, 1900)
    assert (row.first_token_later_turns_ms, row.first_token_later_turns_95_ms) == (1050, 1900)
    assert (row.between_tokens_ms, row.between_tokens_95_ms) == (14.5, 23)
    told, _ = report([{"E": [held]}], {"E": "engine"}, {})
    (line,) = (line for line in told.splitlines() if line.startswith("| E "))
    assert cells_of(line)[3:9] == ["1050.0", "1900.0", "1050.0", "1900.0", "14.50", "23.00"]


def memory_of(values: list[float]) -> Any:
    samples = [
        Sample(seconds=2.0 * number, sessions=100 * number, mib={"tritonserver": value})
        for number, value in enumerate(values)
    ]
    return {growth.part: growth for growth in growths(samples)}["tritonserver"]


def test_memory_that_grows_is_told_from_memory_that_warms_up() -> None:
    flat = memory_of([100.0, 150.0, 200.0, 240.0] + [250.0, 252.0] * 18)
    assert flat.flat
    assert abs(flat.per_thousand_sessions) < 1
    leaking = memory_of([200.0 + number for number in range(40)])
    assert not leaking.flat
    assert leaking.per_thousand_sessions == pytest.approx(10.0)
    assert growths([]) == []


def test_questions_have_the_promised_length_and_pictures_differ() -> None:
    workload = Workload(checkpoint=str(DEMO), repository="none")
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO)
    questions = [workload.question(16, session, turn) for session in range(16) for turn in range(8)]
    assert len(set(questions)) == len(questions)
    for text in questions:
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 24
    pictures = {workload.picture(count, session) for count in (0, 1, 4) for session in range(4)}
    assert len(pictures) == 12


def test_tables_line_up_and_targets_are_judged_by_their_side() -> None:
    judged = [
        Verdict("slow", 3.0, 2.0, unit="ms"),
        Verdict("fast", 90.0, 85.0, at_most=False, unit="%", least=80.0, most=95.0),
        Verdict("unknown", None, 1.0, why="it broke\nin the middle"),
        Verdict("only looked at", 1234.5),
        Verdict("proves nothing", 9.0, 1.0, judged=False),
    ]
    verdicts = [each.verdict for each in judged]
    assert verdicts == ["NOT MET", "met", "not measured", "measured", "measured"]
    lines = verdict_table(judged).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert cells_of(lines[3]) == ["fast", "90 %", "80 to 95", ">= 85 %", "met"]
    assert cells_of(lines[4])[1:] == ["-", "", "<= 1", "not measured (it broke)"]
    told = table(["way", "sessions"], [["E", "1"], ["transformers", "16"]])
    assert told.splitlines() == [
        "| way          | sessions |",
        "| ------------ | -------: |",
        "| E            |        1 |",
        "| transformers |       16 |",
    ]


def test_sessions_ask_again_when_their_answer_is_there() -> None:
    class Counting(Way):
        """Answers at once, and remembers what it was asked."""

        def __init__(self) -> None:
            self.asked: list[Ask] = []

        def ask(self, ask: Ask, answer: Answer | None = None) -> Answer:
            answer = answer or Answer()
            self.asked.append(ask)
            for tokens in (1, 0, 5, 8):
                piece = Delta("a", "length" if tokens == 8 else "", 20, tokens, 4, 1.0)
                answer.take(piece, answer.asked_at + tokens)
            answer.end()
            return answer

        def close(self) -> None:
            """Nothing to do."""

    way = Counting()
    workload = Workload(str(DEMO), "none", turns=2, answer_tokens=8)
    held = check_complete(hold(way, workload, load=3, sessions=2, turns=2), workload)
    asked = [(ask.session_id, ask.start, ask.end, len(ask.images)) for ask in way.asked]
    assert asked == [
        *(("load-3-0", True, False, 1), ("load-3-1", True, False, 1)),
        *(("load-3-0", False, True, 0), ("load-3-1", False, True, 0)),
    ]
    assert len({ask.text for ask in way.asked}) == 4
    assert held.texts(1) == ["aaaa", "aaaa"]
    for turn in held.turns:  # 7 tokens in 7 seconds behind the first piece
        assert turn.first_token_ms == pytest.approx(1000.0)
        assert turn.between_tokens_ms == pytest.approx(1000.0)
        assert turn.around_engine_ms == pytest.approx(999.0)
        assert (turn.prompt_tokens, turn.cached_tokens, turn.output_tokens) == (20, 4, 8)
    # Where nothing lies around the engine, its own clock says when the first token was there.
    way.tells_by_engine = True
    by_engine = hold(way, workload, load=3, sessions=1, turns=1).turns[0]
    assert by_engine.first_token_ms < 0  # submitted at 0, which is long ago
    assert by_engine.around_engine_ms == 0.0
