"""Parts of the container's entry point: its encoder, its shared memory, its numbers."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3
import pytest
from llava_sagemaker.container.cloudwatch import MetricsToCloudWatch, numbers_of
from llava_sagemaker.container.encoder import repository_to_serve
from llava_sagemaker.container.errors import ContainerError
from llava_sagemaker.container.shared_memory import needed_bytes, warning
from moto import mock_aws

MIB = 1024 * 1024


VERSION = "10.9.0.34"
"""Of the TensorRT that these tests have; no GPU and none of it is here."""


@pytest.fixture
def model(demo_repository: Path, tmp_path: Path) -> Path:
    """A repository of the test's own, in a folder of its own."""
    repository = tmp_path / "ml" / "model"
    shutil.copytree(demo_repository, repository, symlinks=True)
    return repository


@pytest.fixture
def for_gpu(model: Path) -> Path:
    """A repository as an export for a GPU leaves it, without its plan."""
    (model / "vision_encoder" / "config.pbtxt").write_text(
        'name: "vision_encoder"\nplatform: "tensorrt_plan"\n'
    )
    return model


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def put_plan(repository: Path, builder: str = "tensorrt", **built_for: str) -> None:
    """A plan with its metadata, as an export seals them."""
    folder = repository / "vision_encoder" / "1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.plan").write_bytes(b"plan")
    built_for = {
        "builder": builder,
        "builder_version": VERSION,
        "compute_capability": "8.6",
        **built_for,
    }
    (folder / "metadata.json").write_text(json.dumps({"built_for": built_for, "files": {}}))


class Export:
    """Stands for the export command: keeps what it was called with, leaves a plan."""

    def __init__(self, status: int = 0, builder: str = "tensorrt") -> None:
        self.status = status
        self.builder = builder
        self.calls: list[dict[str, str]] = []

    def __call__(self, command: Sequence[str]) -> int:
        assert command[1:3] == ["-m", "llava_export"]
        options = dict(zip(command[3::2], command[4::2], strict=True))
        self.calls.append(options)
        if self.status == 0:
            put_plan(Path(options["--output"]), self.builder)
        return self.status


def served(model: Path, export: Export, gpu: str | None = "8.6") -> Path:
    return repository_to_serve(model, lambda: gpu, lambda: VERSION, export)


def test_without_a_gpu_the_model_is_served_as_it_is(demo_repository: Path) -> None:
    export = Export()
    assert served(demo_repository, export, gpu=None) == demo_repository
    assert export.calls == []


def test_a_plan_that_fits_is_served_as_it_is(for_gpu: Path, home: Path) -> None:
    put_plan(for_gpu)
    export = Export()
    assert served(for_gpu, export) == for_gpu
    assert export.calls == []


@pytest.mark.parametrize(
    "stale",
    [
        {"compute_capability": "8.9"},
        {"builder_version": "10.8.0.43"},
        {"builder": "tensorrt_rtx_bindings"},
    ],
    ids=["another GPU", "another TensorRT", "its sister for RTX"],
)
def test_a_plan_that_does_not_fit_is_built_anew(
    for_gpu: Path, home: Path, stale: dict[str, str]
) -> None:
    put_plan(for_gpu, **stale)
    export = Export()
    kept = served(for_gpu, export)
    assert kept.is_relative_to(home)
    (options,) = export.calls
    assert options["--target"] == "gpu"
    assert options["--output"] == str(kept)
    assert (Path(options["--model"]) / "config.json").is_file()
    assert json.loads(Path(options["--settings"]).read_text())["max_sessions"] > 0


def test_what_was_built_is_kept_while_it_fits(model: Path, home: Path) -> None:
    kept = served(model, Export())
    seen_by_the_export = kept / "vision_encoder" / "1" / "model.plan"

    class Looking(Export):
        def __call__(self, command: Sequence[str]) -> int:
            self.found = seen_by_the_export.exists()
            return super().__call__(command)

    again = Looking()
    assert served(model, again) == kept
    assert again.found  # the export then looks whether it is of this model
    put_plan(kept, compute_capability="9.0")
    moved = Looking()
    assert served(model, moved) == kept
    assert not moved.found


def test_an_engine_that_cannot_be_built(
    model: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for export in (Export(status=2), Export(builder="tensorrt_rtx_bindings")):
        assert served(model, export) == model
        assert "without TensorRT" in capsys.readouterr().out


def test_a_model_for_a_gpu_needs_one(for_gpu: Path, home: Path, tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match="could not be built"):
        served(for_gpu, Export(status=2))
    with pytest.raises(ContainerError, match="exported for a GPU and this machine has none"):
        served(for_gpu, Export(), gpu=None)
    with pytest.raises(ContainerError, match="no model repository"):
        served(tmp_path / "nothing", Export())


def test_shared_memory(demo_repository: Path, tmp_path: Path) -> None:
    needed = needed_bytes(demo_repository)
    # Five models of 2 MiB, and four pictures of up to 6 MiB each with what is made of them.
    assert 34 * MIB < needed < 40 * MIB
    assert warning(demo_repository, tmp_path) is None
    big = tmp_path / "big"
    shutil.copytree(demo_repository, big, symlinks=True)
    config = big / "vision_encoder" / "config.pbtxt"
    config.write_text('output { name: "image_features" dims: [ -1, 100000, 100000 ] }')
    told = warning(big, tmp_path)
    assert told is not None
    assert "--shm-size=" in told


METRICS = """\
# HELP llava_sessions Open sessions
# TYPE llava_sessions gauge
llava_sessions{state="active"} 3
llava_sessions{state="idle"} 4
llava_kv_blocks{state="free"} 300
llava_kv_blocks{state="used"} 100
nv_gpu_memory_total_bytes{gpu_uuid="GPU-1"} 85520809984.000000
nv_gpu_memory_used_bytes{gpu_uuid="GPU-1"} 21380202496.000000
"""


def test_numbers_for_cloudwatch() -> None:
    assert numbers_of([METRICS]) == {
        "OpenSessions": (7.0, "Count"),
        "ActiveSessions": (3.0, "Count"),
        "GpuMemoryUsed": (25.0, "Percent"),
    }
    without_gpu = "".join(line for line in METRICS.splitlines(True) if "gpu" not in line)
    assert "GpuMemoryUsed" not in numbers_of([without_gpu])
    assert numbers_of([""])["OpenSessions"] == (0.0, "Count")
    other = METRICS.replace('"used"} 100', '"used"} 300').replace('"active"} 3', '"active"} 0')
    assert numbers_of([METRICS, other]) == {
        "OpenSessions": (11.0, "Count"),
        "ActiveSessions": (3.0, "Count"),
        "GpuMemoryUsed": (40.0, "Percent"),
    }


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An account of AWS's, and the environment of a container."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setenv("LLAVA_ENDPOINT_NAME", "pictures")
    with mock_aws():
        yield


@pytest.mark.usefixtures("aws")
def test_numbers_reach_cloudwatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "metrics"
    page.write_text(METRICS)
    sender = MetricsToCloudWatch.from_environment([page.as_uri()])
    assert sender is not None
    sender.stop()
    sender.send()
    cloudwatch = boto3.client("cloudwatch")
    found: list[dict[str, Any]] = cloudwatch.list_metrics(Namespace="LlavaTriton")["Metrics"]
    names = {metric["MetricName"] for metric in found}
    assert names == {"OpenSessions", "ActiveSessions", "GpuMemoryUsed"}
    dimensions = [{"Name": "EndpointName", "Value": "pictures"}]
    assert all(metric["Dimensions"] == dimensions for metric in found)
    # Outside SageMaker nobody is told.
    monkeypatch.delenv("LLAVA_ENDPOINT_NAME")
    assert MetricsToCloudWatch.from_environment([page.as_uri()]) is None


@pytest.mark.usefixtures("aws")
def test_serving_goes_on_without_cloudwatch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    sender = MetricsToCloudWatch.from_environment([(tmp_path / "nothing").as_uri()])
    assert sender is not None
    deadline = time.monotonic() + 30.0
    while "CloudWatch has not got the metrics" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    sender.stop()
