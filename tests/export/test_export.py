"""Filling a model repository: what is in it, when it is made again, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from llava_export.cli import main
from llava_triton.contract.settings import Settings
from tests.checkpoints import DEMO, tiny_llava

ROOT = Path(__file__).resolve().parents[2]


def config_of(repository: Path, model: str) -> ModelConfig:
    return text_format.Parse((repository / model / "config.pbtxt").read_text(), ModelConfig())


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in files
    }


LIMITS: dict[str, Any] = {
    "max_sessions": 3,
    "session_idle_seconds": 2.5,
    "session_lifetime_seconds": 60,
    "vision_max_batch": 11,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random checkpoint")
    return tiny_llava(folder / "llava", text="mistral", kv_heads=2, image_size=70, seed=4)


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint's repository, self-contained and with limits of its own. Not to be changed."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "limits.json").write_text(json.dumps(LIMITS))
    repository = folder / "repository"
    assert main(arguments(checkpoint, repository, folder / "limits.json")) == 0
    return repository


def arguments(checkpoint: Path, repository: Path, limits: Path | None = None) -> list[str]:
    made = ["--model", str(checkpoint), "--output", str(repository), "--copy"]
    return [*made, "--settings", str(limits)] if limits else made


@pytest.fixture
def repository(exported: Path, tmp_path: Path) -> Path:
    """A copy of the exported repository that a test may change."""
    shutil.copyfile(exported.parent / "limits.json", tmp_path / "limits.json")
    return Path(shutil.copytree(exported, tmp_path / "repository"))


def export_again(checkpoint: Path, repository: Path) -> int:
    return main(arguments(checkpoint, repository, repository.parent / "limits.json"))


def test_every_model_of_the_source_is_there_with_its_code(exported: Path) -> None:
    source = ROOT / "model_repository"
    models = {path.parent.name for path in source.glob("*/config.pbtxt")}
    assert {"llava", "llava_stream", "vision_encoder", "language_model"} <= models
    assert {path.parent.name for path in exported.glob("*/config.pbtxt")} == models
    for model in models:
        assert config_of(exported, model).name == model
        assert (exported / model / "1").is_dir()
        code = source / model / "1" / "model.py"
        if code.exists():
            assert (exported / model / "1" / "model.py").read_text() == code.read_text()


def test_limits_reach_the_settings_and_triton(exported: Path) -> None:
    settings = Settings.of_repository(exported)
    assert settings == Settings(**LIMITS)
    batching = config_of(exported, "language_model").sequence_batching
    assert batching.max_sequence_idle_microseconds == 62_500_000
    assert batching.oldest.max_candidate_sequences == settings.max_candidate_sequences
    assert config_of(exported, "vision_encoder").max_batch_size == 11


def test_vision_encoder_has_the_checkpoints_dimensions(exported: Path) -> None:
    config = config_of(exported, "vision_encoder")
    assert config.backend == "python"
    assert list(config.input[0].dims) == [3, 70, 70]
    assert list(config.output[0].dims) == [25, 64]
    assert config.HasField("dynamic_batching")


def test_repository_holds_the_checkpoint_and_its_image_processor(
    exported: Path, checkpoint: Path
) -> None:
    copy = exported / "language_model" / "1" / "checkpoint"
    assert not copy.is_symlink()
    for file in checkpoint.iterdir():
        assert (copy / file.name).read_bytes() == file.read_bytes()
    picture = Image.effect_noise((90, 120), 80).convert("RGB")
    folder = exported / "image_encoder" / "1" / "processor"
    pixels = [
        AutoImageProcessor.from_pretrained(each)(picture, return_tensors="np")["pixel_values"]
        for each in (folder, checkpoint)
    ]
    assert (pixels[0] == pixels[1]).all()


def test_checkpoint_is_linked_unless_copied(demo_repository: Path) -> None:
    link = demo_repository / "language_model" / "1" / "checkpoint"
    assert link.is_symlink()
    assert link.resolve() == DEMO


def test_unchanged_export_does_nothing_fast_and_without_torch(
    exported: Path, checkpoint: Path
) -> None:
    before = contents(exported)
    limits = exported.parent / "limits.json"
    code = (
        "import sys; from llava_export.cli import main; status = main(sys.argv[1:]); "
        "sys.exit(status or 100 * ('torch' in sys.modules or 'transformers' in sys.modules))"
    )
    command = [sys.executable, "-c", code, *arguments(checkpoint, exported, limits)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "up to date" in done.stdout
    assert contents(exported) == before


def test_same_weights_elsewhere_keep_the_encoder(
    repository: Path, checkpoint: Path, tmp_path: Path
) -> None:
    elsewhere = Path(shutil.copytree(checkpoint, tmp_path / "elsewhere"))
    graph = (repository / "vision_encoder" / "1" / "model.onnx").stat().st_ino
    assert export_again(elsewhere, repository) == 0
    assert (repository / "vision_encoder" / "1" / "model.onnx").stat().st_ino == graph
    before = contents(repository)
    assert export_again(elsewhere, repository) == 0
    assert contents(repository) == before
    os.utime(elsewhere / "config.json")
    assert export_again(elsewhere, repository) == 0
    assert contents(repository) != before
    assert (repository / "vision_encoder" / "1" / "model.onnx").stat().st_ino == graph


def test_other_limits_are_filled_in_and_keep_the_encoder(
    repository: Path, checkpoint: Path
) -> None:
    (repository.parent / "limits.json").write_text('{"vision_max_batch": 11, "max_sessions": 9}')
    graph = (repository / "vision_encoder" / "1" / "model.onnx").stat().st_ino
    assert export_again(checkpoint, repository) == 0
    assert Settings.of_repository(repository).max_sessions == 9
    assert (repository / "vision_encoder" / "1" / "model.onnx").stat().st_ino == graph


def test_lost_graph_is_made_again(repository: Path, checkpoint: Path) -> None:
    graph = repository / "vision_encoder" / "1" / "model.onnx"
    size = graph.stat().st_size
    graph.unlink()
    assert export_again(checkpoint, repository) == 0
    assert graph.stat().st_size == size


def test_failed_export_leaves_the_old_repository(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("llava_export.encoder.export_onnx", lambda *_: shutil.copy("nowhere", "x"))
    other = tiny_llava(tmp_path / "other", seed=5)
    before = contents(repository)
    assert export_again(other, repository) == 2
    assert "nowhere" in capsys.readouterr().err
    assert contents(repository) == before
    assert {path.name for path in tmp_path.iterdir()} == {"other", "limits.json", "repository"}


def test_gpu_repository_has_a_plan_with_the_same_tensors(
    exported: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = [*arguments(checkpoint, tmp_path / "gpu"), "--target", "gpu"]
    command += ["--compute-capability", "8.6"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "the engine itself has not run" in printed or "on NVIDIA" in printed
    encoder = tmp_path / "gpu" / "vision_encoder"
    config, on_cpu = (
        config_of(tmp_path / "gpu", "vision_encoder"),
        config_of(exported, "vision_encoder"),
    )
    assert (config.backend, config.platform) == ("tensorrt", "tensorrt_plan")
    assert config.instance_group[0].kind == ModelInstanceGroup.KIND_GPU
    assert list(config.input) == list(on_cpu.input)
    assert list(config.output) == list(on_cpu.output)
    assert config.HasField("dynamic_batching")
    assert {path.name for path in (encoder / "1").iterdir()} == {
        "model.plan",
        "metadata.json",
        "report.json",
    }
    report = json.loads((encoder / "1" / "report.json").read_text())
    assert report["precision"] == "fp16"
    assert report["passed"]
    # Other limits need no other engine; another GPU does.
    plan = encoder / "1" / "model.plan"
    first = plan.stat().st_ino
    (tmp_path / "limits.json").write_text('{"max_sessions": 2}')
    assert main([*command, "--settings", str(tmp_path / "limits.json")]) == 0
    assert plan.stat().st_ino == first
    built = []

    def build(tensorrt: object, graph: Path, plan: Path, *, capability: str, **_: object) -> None:
        built.append(capability)
        plan.write_bytes(b"a plan")

    monkeypatch.setattr("llava_export.encoder.build_engine", build)
    assert main([*command[:-1], "8.9"]) == 0
    assert built == ["8.9"]
    assert plan.read_bytes() == b"a plan"


def refuse_download(*_: object, **__: object) -> None:
    raise LocalEntryNotFoundError("it cannot be reached")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--model": "nowhere"}, "nowhere does not exist"),
        ({"--model": "nobody/nothing"}, "the hub does not give it: it cannot be reached"),
        ({"--model": "EMPTY"}, "is no checkpoint: it has no config.json"),
        ({"--model": "CLIP"}, "is a checkpoint of type 'clip'"),
        ({"--model": "NO TEMPLATE"}, "has no chat template"),
        ({"--model": "OTHER SIZE"}, "image processor and its vision tower do not fit"),
        ({"--output": "FULL"}, "holds something other than an exported model repository"),
        ({"--output": "FILE"}, "is a file; name a directory"),
        ({"--output": "FILE/repository"}, "cannot be written"),
        ({"--output": "CHECKPOINT/.."}, "lies inside"),
        ({"--target": "gpu"}, "no NVIDIA GPU to build for"),
        ({"--target": "gpu", "--compute-capability": "9.0"}, "cannot build for compute capability"),
        ({"--target": "gpu", "without": "tensorrt"}, "needs TensorRT, and none is installed"),
        ({"--precision": "fp16"}, "--precision fp16 is for --target gpu"),
        ({"--compute-capability": "8.6"}, "--compute-capability is for --target gpu"),
        ({"--settings": "FILE"}, "does not hold settings"),
        ({"--settings": "nowhere"}, "does not hold settings"),
    ],
    ids=lambda value: " ".join(value.values()) if isinstance(value, dict) else None,
)
def test_mistake_is_one_clear_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, str],
    message: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse_download)
    monkeypatch.setattr("llava_export.tensorrt_engine.local_compute_capability", lambda: None)
    if options.pop("without", None):
        for module in ("tensorrt", "tensorrt_rtx_bindings"):
            monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    places = make_places(tmp_path)
    command = {"--model": "CHECKPOINT", "--output": "new", **options}
    for option, value in command.items():
        place, slash, rest = value.partition("/")
        if place in places:
            command[option] = f"{places[place]}{slash}{rest}"
    command["--output"] = str(tmp_path / command["--output"])
    before = contents(tmp_path)
    assert main([word for pair in command.items() for word in pair]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert contents(tmp_path) == before


def make_places(folder: Path) -> dict[str, Path]:
    """Checkpoints and outputs with something wrong, by the names the test gives them."""
    names = ("CHECKPOINT", "EMPTY", "CLIP", "NO TEMPLATE", "OTHER SIZE", "FULL", "FILE")
    places = {name: folder / name.lower() / "it" for name in names}
    for place in places.values():
        place.parent.mkdir()
    for name in ("CHECKPOINT", "NO TEMPLATE", "OTHER SIZE"):
        tiny_llava(places[name])
    (places["NO TEMPLATE"] / "chat_template.jinja").unlink()
    config = places["OTHER SIZE"] / "preprocessor_config.json"
    config.write_text(config.read_text().replace("56", "84"))
    for name in ("EMPTY", "CLIP", "FULL"):
        places[name].mkdir()
    (places["CLIP"] / "config.json").write_text('{"model_type": "clip"}')
    (places["FULL"] / "letter.txt").write_text("dear")
    places["FILE"].write_text("dear")
    return places


def test_hub_name_exports_the_downloaded_snapshot(
    exported: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = []
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = Path(shutil.copytree(checkpoint, tmp_path / "snapshots" / commit))

    def download(name: str, *, revision: str | None, **_: object) -> str:
        asked.append((name, revision))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    # The encoder of the earlier export fits, so that this one is quick.
    repository = Path(shutil.copytree(exported, tmp_path / "repository"))
    limits = exported.parent / "limits.json"
    for revision in (None, "v1.0", commit):
        name = "llava-hf/llava-1.5-7b-hf"
        model = name if revision is None else f"{name}@{revision}"
        command = ["--model", model, "--output", str(repository)]
        assert main([*command, "--settings", str(limits)]) == 0
        assert asked.pop() == (name, revision)
        assert f"{name} at commit {commit}" in capsys.readouterr().out
        assert (repository / "language_model" / "1" / "checkpoint").resolve() == snapshot
        manifest = json.loads((repository / "export.json").read_text())
        assert manifest["made_from"]["options"]["hub"] == {"name": name, "commit": commit}


def with_code_of_its_own(directory: Path, files: dict[str, dict[str, Any]]) -> Path:
    """A checkpoint some of whose JSON files name classes of a module beside them."""
    tiny_llava(directory)
    (directory / "evil.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(directory.parent / 'it ran')!r}).touch()\n"
        "class Evil: pass\n"
    )
    for file, said in files.items():
        path = directory / file
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | said))
    return directory


OWN = "evil.Evil"


@pytest.mark.parametrize(
    ("files", "needed"),
    [
        (
            {
                "config.json": {"auto_map": {"AutoConfig": OWN, "AutoModel": OWN}},
                "tokenizer_config.json": {"auto_map": {"AutoTokenizer": [OWN, OWN]}},
            },
            False,
        ),
        (
            {
                "processor_config.json": {
                    "processor_class": "Evil",
                    "auto_map": {"AutoProcessor": OWN},
                }
            },
            False,
        ),
        (
            {
                "preprocessor_config.json": {
                    "image_processor_type": "Evil",
                    "auto_map": {"AutoImageProcessor": OWN},
                }
            },
            True,
        ),
    ],
    ids=["transformers has its own", "processor", "image processor"],
)
def test_a_checkpoints_own_code_is_never_run(
    tmp_path: Path, files: dict[str, dict[str, Any]], needed: bool
) -> None:
    """Nobody is asked either: "yes" to whatever question would not run it."""
    checkpoint = with_code_of_its_own(tmp_path / "checkpoint", files)
    command: list[Any] = [sys.executable, "-m", "llava_export", "--model", checkpoint]
    done = subprocess.run(
        [*command, "--output", tmp_path / "repository"],
        input="y\n" * 9,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HOME": str(tmp_path / "hub")},
    )
    assert not (tmp_path / "it ran").exists()
    assert "[y/N]" not in done.stdout + done.stderr
    if needed:
        assert done.returncode == 2, done.stdout + done.stderr
        assert "brings Python code of its own" in done.stderr
        assert done.stderr.count("\n") == 1
    else:
        assert done.returncode == 0, done.stdout + done.stderr
