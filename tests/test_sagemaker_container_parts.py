"""Parts of the container's entry point: its encoder, its shared memory, its numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import boto3
import pytest
from llava_sagemaker.container import encoder as encoder_module
from llava_sagemaker.container.cloudwatch import MetricsToCloudWatch, numbers_of
from llava_sagemaker.container.encoder import repository_to_serve
from llava_sagemaker.container.errors import ContainerError
from llava_sagemaker.container.shared_memory import needed_bytes, warning
from moto import mock_aws

MIB = 1024 * 1024


@pytest.fixture
def for_gpu(demo_repository: Path, tmp_path: Path) -> Path:
    """A repository as an export for a GPU leaves it, without its plan."""
    repository = tmp_path / "for a gpu"
    shutil.copytree(demo_repository, repository, symlinks=True)
    (repository / "vision_encoder" / "config.pbtxt").write_text(
        'name: "vision_encoder"\nplatform: "tensorrt_plan"\n'
    )
    return repository


class Export:
    """Stands for the export command: keeps what it was called with."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.calls: list[list[str]] = []

    def __call__(self, command: Sequence[str]) -> int:
        self.calls.append(list(command))
        return self.status


def test_without_a_gpu_the_model_is_served_as_it_is(demo_repository: Path) -> None:
    export = Export(0)
    assert repository_to_serve(demo_repository, lambda: None, export) == demo_repository
    assert export.calls == []


def test_with_a_gpu_the_engine_is_built_and_kept(
    demo_repository: Path, for_gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in (demo_repository, for_gpu):
        export = Export(0)
        assert repository_to_serve(model, lambda: "9.0", export) == model / "tensorrt"
        (command,) = export.calls
        options = dict(zip(command[3::2], command[4::2], strict=True))
        assert options["--target"] == "gpu"
        assert (Path(options["--model"]) / "config.json").is_file()
        assert json.loads(Path(options["--settings"]).read_text())["max_sessions"] > 0
        assert options["--output"] == str(model / "tensorrt")
    # SageMaker may give the model read-only.
    monkeypatch.setattr(encoder_module.os, "access", lambda *_: False)
    kept = repository_to_serve(for_gpu, lambda: "9.0", Export(0))
    assert not kept.is_relative_to(for_gpu)


def test_an_engine_that_cannot_be_built(
    demo_repository: Path, for_gpu: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert repository_to_serve(demo_repository, lambda: "9.0", Export(2)) == demo_repository
    assert "without TensorRT" in capsys.readouterr().out
    with pytest.raises(ContainerError, match="could not be built"):
        repository_to_serve(for_gpu, lambda: "9.0", Export(2))


def test_a_model_for_a_gpu_needs_one(for_gpu: Path, tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match="exported for a GPU and this machine has none"):
        repository_to_serve(for_gpu, lambda: None, Export(0))
    with pytest.raises(ContainerError, match="no model repository"):
        repository_to_serve(tmp_path / "nothing", lambda: None, Export(0))


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
nv_gpu_memory_total_bytes{gpu_uuid="GPU-1"} 85520809984.000000
nv_gpu_memory_used_bytes{gpu_uuid="GPU-1"} 21380202496.000000
"""


def test_numbers_for_cloudwatch() -> None:
    assert numbers_of(METRICS) == {
        "OpenSessions": (7.0, "Count"),
        "ActiveSessions": (3.0, "Count"),
        "GpuMemoryUsed": (25.0, "Percent"),
    }
    assert "GpuMemoryUsed" not in numbers_of("llava_turns 3\n")


@mock_aws
def test_numbers_reach_cloudwatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    page = tmp_path / "metrics"
    page.write_text(METRICS)
    assert MetricsToCloudWatch.from_environment(page.as_uri()) is None
    monkeypatch.setenv("LLAVA_ENDPOINT_NAME", "pictures")
    sender = MetricsToCloudWatch.from_environment(page.as_uri())
    assert sender is not None
    sender.stop()
    sender.send()
    found: list[dict[str, Any]] = boto3.client("cloudwatch").list_metrics(Namespace="LlavaTriton")[
        "Metrics"
    ]
    assert {metric["MetricName"] for metric in found} == {
        *("OpenSessions", "ActiveSessions", "GpuMemoryUsed")
    }
    assert all(
        metric["Dimensions"] == [{"Name": "EndpointName", "Value": "pictures"}] for metric in found
    )


@mock_aws
def test_serving_goes_on_without_cloudwatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setenv("LLAVA_ENDPOINT_NAME", "pictures")
    sender = MetricsToCloudWatch.from_environment((tmp_path / "nothing").as_uri())
    assert sender is not None
    sender.stop()
    assert "CloudWatch has not got the metrics" in caplog.text
