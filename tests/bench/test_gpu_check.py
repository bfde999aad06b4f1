"""`make gpu-check` on the CPU with a tiny model: every line of it but those that need CUDA."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.gpu_check.__main__ import SECONDS, STEPS, Check, Stage, server_problem
from benchmarks.gpu_check.agreement import Agreement, Difference
from benchmarks.gpu_check.pythons import NO_GPU, Pythons, WheelsError
from benchmarks.gpu_check.report import ROWS, Outcome, Report
from benchmarks.gpu_check.stage import PARAMETERS, TINY, Findings, Place, read_findings
from benchmarks.gpu_check.wheels import NEEDED, pinned, shrink
from benchmarks.load import Answer, joint_tokens_per_second
from benchmarks.processes import this_process
from benchmarks.references import Transformers
from llava_triton.contract.delta import Delta
from llava_triton.kernels.gpu.parameters import Parameters
from tests.conftest import ROOT
from tests.engine.test_on_gpu import (
    check_answers_agree,
    check_nothing_leaks,
    check_sessions_come_back,
)

MIB = 1 << 20


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", *arguments],
        cwd=ROOT,
        env=os.environ | NO_GPU,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For checkpoints and results of all steps."""
    return tmp_path_factory.mktemp("steps of a test")


@pytest.mark.parametrize("step", list(STEPS))
def test_a_step_runs_without_a_gpu_and_says_so(step: int, shared: Path) -> None:
    output = shared / "results"
    given = ["--cpu", "--step", str(step), "--output", str(output), "--wheels", str(shared / "no")]
    done = run(*given, "--scratch", str(shared / "scratch"), "--seconds", "2000")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    values = json.loads((output / f"gpu-check-{step}.json").read_text())
    text = (output / f"gpu-check-{step}.txt").read_text()
    assert text in done.stdout
    assert values["run_without_a_gpu"] is True
    assert values["complete"] is True
    assert text.startswith("THIS WAS A RUN WITHOUT A GPU")
    assert [stage["result"] for stage in values["stages"]] == ["passed"] * len(STEPS[step])
    not_here = {"  with dependent launch"}
    verdicts = {row["verdict"] for row in values["rows"] if row["text"] not in not_here}
    assert verdicts == {"measured"}, text
    found = {stage["name"]: stage["values"] for stage in values["stages"]}
    if step == 1:
        parameters = Parameters.from_json((output / PARAMETERS).read_text())
        assert asdict(parameters) == found["kernels"]["prompt_parameters"]
        assert {"product_qkv_1", "node_plain_us"} <= found["kernels"].keys()
        assert found["step"]["decode_one_kernels"]
    elif step == 2:
        assert found["prepare"]["llava-1.5-7b_bytes"] < 10 * MIB
        assert found["triton"]["first_at_once_ms"] > 0
        assert found["rows"]["opening_kernels"]
    else:
        assert found["agreement"]["agreement_demo"]["tokens"] > 0
        assert found["open"]["sessions_opened"] == TINY.wanted_sessions
        assert "llava-1.5-7b_bytes" not in found["prepare"]  # step 2 had written it


def test_the_command_itself_needs_nothing_that_is_ours() -> None:
    # It runs by a GPU machine's own Python, where nothing is installed.
    code = "import sys, benchmarks.gpu_check.__main__; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    loaded = {name.partition(".")[0] for name in told.stdout.decode().split()}
    assert loaded.isdisjoint({"llava_triton", "llava_export", "tritonclient", "transformers"})


def test_without_a_gpu_one_sentence_says_so(tmp_path: Path) -> None:
    done = run(
        "--step", "1", "--output", str(tmp_path / "results"), "--wheels", str(tmp_path / "none")
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: torch finds no NVIDIA GPU on this machine")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_check_reports_what_it_found_and_leaves_nothing(
    tmp_path: Path, number: signal.Signals
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    output = tmp_path / "results"
    stages = ["kernels"]
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--cpu", "--step", "1"]
    command += ["--output", str(output)]
    process = subprocess.Popen(
        [*command, "--wheels", str(tmp_path / "none"), "--stages", *stages],
        cwd=ROOT,
        env=os.environ | NO_GPU | {"TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    told = ""
    try:
        while not all(f"--- {name}: " in told for name in stages):
            line = process.stdout.readline()
            assert line, "it ended by itself"
            told += line
        process.send_signal(number)
        process.send_signal(number)  # as impatient people do
        rest, errors = process.communicate(timeout=60)
        _, left = psutil.wait_procs(processes_with(f"TMPDIR={scratch}"), timeout=10.0)
    finally:
        for each in processes_with(f"TMPDIR={scratch}"):  # the check itself, too
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()
    assert left == []
    assert process.returncode == 1, told + rest + errors
    report = output / "gpu-check-1.json"
    assert f"stopped; what was found is in {report}" in errors
    assert "Traceback" not in errors
    found = {stage["name"]: stage for stage in json.loads(report.read_text())["stages"]}
    assert {name: found[name]["result"] for name in stages} == dict.fromkeys(stages, "cut off")
    assert {found[name]["why"] for name in stages} == {"the check was stopped"}
    assert not json.loads(report.read_text())["complete"]
    assert list(scratch.iterdir()) == []


def test_a_few_stages_do_not_replace_a_whole_report(tmp_path: Path) -> None:
    report = tmp_path / "gpu-check-3.json"
    report.write_text("{}")
    step = ["--cpu", "--step", "3", "--output", str(tmp_path)]
    done = run(*step, "--stages", "rows-mistral")
    assert done.returncode == 2
    assert f"would replace {report}; name another --output" in done.stderr
    assert report.read_text() == "{}"
    done = run(*step, "--stages", "rows")
    assert done.returncode == 2
    assert "step 3 has no stage rows; it has prepare, agreement," in done.stderr


def processes_with(variable: str) -> list[psutil.Process]:
    """The processes that have a variable of the environment."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError, psutil.NoSuchProcess):  # no process, another's, or ended
            if variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(psutil.Process(int(process.name)))
    return found


# Stages.


@pytest.fixture(scope="module")
def pythons(tmp_path_factory: pytest.TempPathFactory) -> Pythons:
    folder = tmp_path_factory.mktemp("pythons of a test")
    return Pythons(folder, folder / "no wheels")


FACTS: dict[str, Any] = {
    "device": "a GPU",
    "memory_gib": 80.0,
    "driver": "1",
    "cuda": "13.0",
    "python": "3.12",
    "versions": {"torch": "2.11", "nvidia-pytriton": "0.7.0", "tritonclient": None},
    "libpython": True,
    "date": "today",
    "commit": None,
}


def check(tmp_path: Path, pythons: Pythons, *stages: Stage, seconds: float = 100.0) -> Report:
    report = Report(tmp_path / "out", 2, FACTS, cpu=True, stages=[stage.name for stage in stages])
    ends_at = time.monotonic() + seconds
    Check(tmp_path, pythons, report, cpu=True, ends_at=ends_at).run(stages, "no wheel of it")
    return report


def outcomes(report: Report) -> dict[str, Any]:
    stages = json.loads(report.file.read_text())["stages"]
    return {stage["name"]: stage for stage in stages}


def test_a_stage_that_breaks_or_hangs_does_not_stop_the_others(
    tmp_path: Path, pythons: Pythons
) -> None:
    # No checkpoint was prepared: the rows break in the middle, the findings before stay.
    rows = Stage("rows", "rows", "rows", 60, "llava-1.5-7b")
    hangs = Stage("tests", "hangs", "device_tests", 0.05)
    served = Stage("triton", "served", "triton", 60, on_server=True)
    missing = Stage("memory", "missing", "no_such_stage", 60)
    report = check(tmp_path, pythons, rows, hangs, served, missing)
    found = outcomes(report)
    results = {name: stage["result"] for name, stage in found.items()}
    assert results == {
        "rows": "failed",
        "tests": "cut off",
        "triton": "not run",
        "memory": "failed",
    }
    assert found["rows"]["values"]["limits"]["read_bytes_per_second"] > 0
    assert "cannot be loaded as a LLaVA checkpoint" in found["rows"]["why"]
    assert any("Traceback" in line for line in found["rows"]["output_end"])
    assert found["tests"]["why"] == "it took more than 0 s"
    assert found["triton"]["why"] == "no wheel of it"
    assert not report.complete
    judged = {row["text"]: row for row in report.rows()}
    decode = judged["decode, 1 session, of the limit, through Triton"]
    assert (decode["verdict"], decode["why"]) == ("not measured", "triton: no wheel of it")


def test_what_the_deadline_leaves_no_time_for_is_said(tmp_path: Path, pythons: Pythons) -> None:
    report = check(tmp_path, pythons, Stage("tests", "", "device_tests", 60), seconds=5)
    assert outcomes(report)["tests"]["result"] == "not run"
    assert "the time of the whole check was used up" in report.file.with_suffix(".txt").read_text()


def test_what_keeps_triton_from_running_is_said(tmp_path: Path) -> None:
    said = server_problem(FACTS, tmp_path)
    assert said is not None
    assert said.startswith("tritonclient missing: no wheel of it in")
    complete = FACTS | {"versions": {"nvidia-pytriton": "0.7.0", "tritonclient": "2.73.0"}}
    assert server_problem(complete, tmp_path) is None
    said = server_problem(complete | {"libpython": False}, tmp_path)
    assert said is not None
    assert "no libpython" in said


# The report.


def test_targets_are_judged_on_a_gpu_only(tmp_path: Path) -> None:
    met = {"decode_one_share": 0.9, "later_excess_ms": 3.5}
    verdicts = {}
    for cpu in (False, True):
        report = Report(tmp_path, 2, FACTS, cpu=cpu, stages=["triton"])
        report.add(Outcome("triton", "", "passed", 1.0, values=met))
        verdicts[cpu] = {row["finding"]: row["verdict"] for row in report.rows()[:3]}
        assert report.text().startswith("THIS WAS") == cpu
    assert list(verdicts[False].values()) == ["met", "not measured", "NOT MET"]
    assert verdicts[True]["decode_one_share"] == "measured"


def test_every_row_names_a_stage() -> None:
    names = {stage.name for stages in STEPS.values() for stage in stages}
    assert {row.stage for row in ROWS} <= names


def test_no_step_plans_more_than_ten_minutes() -> None:
    # Step 1 as a whole; in the others the limits are where a stage has hung.
    assert sum(stage.seconds for stage in STEPS[1]) <= 600
    assert SECONDS < 600


# Wheels.


def wheel(folder: Path, name: str, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    content = {**files, f"{info}/METADATA": metadata, f"{info}/WHEEL": tags}
    record = "".join(f"{path},,\n" for path in [*content, f"{info}/RECORD"])
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for entry, text in {**content, f"{info}/RECORD": record}.items():
            archive.writestr(entry, text)
    return path


def test_what_was_brought_along_is_found_by_the_stages(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheel(wheels, "brought", {"brought.py": "WHERE = 'all'\n"})
    wheel(wheels, "numpy", {"numpy/__init__.py": "__version__ = 'brought'\n"})
    pythons = Pythons(tmp_path / "run here", wheels)
    code = "import brought, importlib.util as u, numpy, llava_triton, llava_export, benchmarks;"
    code += "print(numpy.__version__, u.find_spec('scipy'), llava_triton.__path__[0])"
    told = [
        subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
        for python in (pythons.plain, pythons.server)
    ]
    assert told[0].split()[0] != "brought"
    assert told[1].split()[:2] == ["brought", "None"]
    assert all(str(ROOT / "python_backend") in each for each in told)


def test_a_wheel_that_is_none_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "broken-1.0-py3-none-any.whl").write_text("nothing")
    with pytest.raises(WheelsError, match="cannot be installed"):
        Pythons(tmp_path / "run", tmp_path)


def test_wheels_are_made_smaller_and_stay_whole(tmp_path: Path) -> None:
    stubs = "pytriton/tritonserver/python_backend_stubs"
    files = {
        f"{stubs}/3.12/triton_python_backend_stub": "ours",
        f"{stubs}/3.11/triton_python_backend_stub": "another Python's",
        "nvidia_pytriton.libs/libpython3-419a.13.so.1.0": "another Python's",
        "numpy/core/tests/test_all.py": "tests",
        "pytriton/__init__.py": "x = 1\n" * 10_000,
    }
    given = wheel(tmp_path / "given", "nvidia_pytriton", files)
    smaller = tmp_path / "smaller" / given.name
    smaller.parent.mkdir()
    shrink(given, smaller)
    with zipfile.ZipFile(smaller) as archive:
        names = archive.namelist()
        record = archive.read("nvidia_pytriton-1.0.dist-info/RECORD").decode()
    kept = [f"{stubs}/3.12/triton_python_backend_stub", "pytriton/__init__.py"]
    assert [name for name in names if ".dist-info" not in name] == kept
    assert [line.split(",")[0] for line in record.splitlines()] == names
    pythons = Pythons(tmp_path / "run", smaller.parent)
    code = "import pytriton; print(pytriton.__file__)"
    done = subprocess.run([pythons.server, "-c", code], capture_output=True, text=True, check=True)
    assert str(tmp_path) in done.stdout


def test_everything_to_be_brought_along_has_a_version() -> None:
    versions = pinned(ROOT / "constraints.txt")
    assert list(versions) == list(NEEDED)
    assert versions["nvidia-pytriton"] == "nvidia-pytriton==0.7.0"


# Agreement, and what is measured over several answers.


def difference(true_gap: float, noise: float) -> Difference:
    return Difference("?", 0, 1, 2, true_gap, 1.0, true_gap, noise)


def test_only_differences_within_rounding_are_explained() -> None:
    agreement = Agreement(3, 30, [difference(0.01, 0.02), difference(0.5, 0.02)])
    assert agreement.unexplained == 1


def test_a_wrong_answer_is_no_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers hears another question than the engine.
    answer = Transformers.answer

    def misheard(self: Any, prompt: Any, pictures: Any, tokens: int) -> Any:
        changed = [*prompt[:-8], *prompt[-9:-1]]
        return answer(self, changed, pictures, tokens)

    monkeypatch.setattr(Transformers, "answer", misheard)
    with pytest.raises(AssertionError, match="true_gap"):
        check_answers_agree(Place.of(cpu=True), turns=4)


def test_tokens_are_counted_while_all_answers_come() -> None:
    def piece(tokens: int) -> Delta:
        return Delta("a", "", 5, tokens, 0, 1.0)

    one = Answer(events=[(1.0, piece(1)), (2.0, piece(11)), (3.0, piece(21))])
    other = Answer(events=[(2.0, piece(1)), (3.0, piece(6)), (4.0, piece(11))])
    assert joint_tokens_per_second([one, other]) == pytest.approx(15.0)
    late = Answer(events=[(5.0, piece(1)), (6.0, piece(2))])
    assert joint_tokens_per_second([one, late]) is None


def test_findings_are_on_disk_at_once_and_a_fault_fails_the_stage(tmp_path: Path) -> None:
    file = tmp_path / "findings.json"
    assert read_findings(file)["values"] == {}
    findings = Findings(file)
    findings.add("speed", 3.0, "fast")
    assert read_findings(file)["values"] == {"speed": 3.0}

    def breaks() -> None:
        raise ValueError("a broken part")

    findings.attempt("something", breaks)
    assert read_findings(file)["faults"] == ["something: ValueError: a broken part"]


# The bodies of test_on_gpu.py.


def test_answers_agree_with_transformers_on_the_cpu() -> None:
    check_answers_agree(Place.of(cpu=True), turns=4)


def test_answers_in_a_half_type_agree_but_for_rounding() -> None:
    check_answers_agree(Place(torch.device("cpu"), torch.bfloat16, TINY), turns=4)


def test_evicted_sessions_come_back(checkpoint: Path) -> None:
    check_sessions_come_back(checkpoint, "cpu")


def test_sessions_leak_nothing(checkpoint: Path) -> None:
    def used() -> int:
        return int(this_process().private_mib * MIB)

    check_nothing_leaks(checkpoint, "cpu", TINY.leak_sessions, used, allowed=64 * MIB)
