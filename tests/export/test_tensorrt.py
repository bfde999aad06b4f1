"""Real TensorRT builds; they need no GPU, and nothing here runs an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextVideoConfig,
    LlavaOnevisionConfig,
    Qwen2Config,
)

from llava_export import artifact
from llava_export.artifact import EncoderMetadata
from llava_export.errors import ExportError
from llava_export.mixed_precision import to_mixed_precision
from llava_export.onnx_export import export_onnx
from llava_export.tensorrt_engine import build_engine, check_capability, find_tensorrt
from llava_triton.checkpoint.families import Config
from llava_triton.checkpoint.vision_tower import VisionEncoder, features_shape

METADATA = EncoderMetadata(
    format="tensorrt",
    builder="tensorrt",
    builder_version="10.5.0",
    compute_capability="8.6",
    precision="fp16",
    input_shape=(3, 336, 336),
    output_shape=(576, 4096),
    max_batch=8,
    checkpoint_sha256="c" * 64,
    exporter="e" * 64,
)


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_export.tensorrt_engine.local_compute_capability", lambda: None)


def test_builds_the_demo_engine_from_its_graph(demo_repository: Path, tmp_path: Path) -> None:
    graph = demo_repository / "vision_encoder" / "1" / "model.onnx"
    plan = tmp_path / "model.plan"
    tensorrt = find_tensorrt()
    build_engine(
        tensorrt,
        graph,
        plan,
        capability=check_capability(tensorrt, "8.6"),
        input_shape=(3, 96, 96),
        max_batch=8,
    )
    assert plan.stat().st_size > graph.stat().st_size  # the weights, and code
    assert [path.name for path in tmp_path.iterdir()] == ["model.plan"]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A published vision encoder's."""

    config: Config
    side: int
    """Pixels of a tile."""
    features: tuple[int, int]
    weights: float
    """Billions of them, tower and projector."""


GEOMETRIES = {
    "CLIP ViT-L/14-336, LLaVA-1.5-7B": Geometry(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=336,
                patch_size=14,
            ),
            text_config=LlamaConfig(hidden_size=4096),
        ),
        side=336,
        features=(576, 4096),
        weights=0.325,
    ),
    "SigLIP so400m/14-384, OneVision-7B": Geometry(
        LlavaOnevisionConfig(text_config=Qwen2Config(hidden_size=3584)),
        side=384,
        features=(729, 3584),
        weights=0.415,
    ),
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=list(GEOMETRIES))
def test_builds_published_geometries_in_mixed_precision(geometry: Geometry, tmp_path: Path) -> None:
    side = geometry.side
    assert features_shape(geometry.config, side) == geometry.features
    torch.manual_seed(0)
    graph, plan = tmp_path / "model.onnx", tmp_path / "model.plan"
    export_onnx(to_mixed_precision(VisionEncoder(geometry.config).eval()), side, graph)
    build_engine(
        find_tensorrt(), graph, plan, capability="8.9", input_shape=(3, side, side), max_batch=8
    )
    weights = graph.stat().st_size
    assert weights == pytest.approx(2e9 * geometry.weights, rel=0.05)
    assert abs(plan.stat().st_size - weights) < 0.05 * weights
    graph.unlink()
    plan.unlink()  # pytest keeps temporary folders for a while


def test_builds_an_encoder_that_pools_frames(tmp_path: Path) -> None:
    """As LLaVA-NeXT-Video's, with a small tower."""
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
        ),
        text_config=LlamaConfig(hidden_size=128),
    )
    assert features_shape(config, 56) == (16 + 4, 128)
    graph, plan = tmp_path / "model.onnx", tmp_path / "model.plan"
    export_onnx(to_mixed_precision(VisionEncoder(config).eval()), 56, graph)
    build_engine(
        find_tensorrt(), graph, plan, capability="8.9", input_shape=(3, 56, 56), max_batch=8
    )
    assert plan.stat().st_size > graph.stat().st_size


def test_graph_that_cannot_be_built_is_one_clear_error(tmp_path: Path) -> None:
    graph, plan = tmp_path / "model.onnx", tmp_path / "model.plan"
    graph.write_bytes(b"not ONNX")
    with pytest.raises(ExportError, match="TensorRT cannot read the ONNX graph"):
        build_engine(
            find_tensorrt(), graph, plan, capability="8.6", input_shape=(3, 96, 96), max_batch=8
        )
    assert not plan.exists()


@pytest.mark.usefixtures("without_gpu")
def test_capability_must_be_named_without_a_gpu_and_be_known() -> None:
    tensorrt = find_tensorrt()
    assert check_capability(tensorrt, "8.9") == "8.9"
    with pytest.raises(ExportError, match=r"no NVIDIA GPU to build for.*--compute-capability"):
        check_capability(tensorrt, None)
    for unknown in ("9.0", "86", "nonsense"):
        with pytest.raises(ExportError, match=rf"cannot build for .*{unknown}.*8\.6, 8\.9"):
            check_capability(tensorrt, unknown)


def sealed(directory: Path) -> Path:
    (directory / METADATA.file_name).write_bytes(b"a plan")
    artifact.seal(directory, METADATA)
    return directory


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(EncoderMetadata)])
def test_any_difference_means_building_again(tmp_path: Path, field: str) -> None:
    others: dict[str, Any] = {
        "format": "onnx",
        "compute_capability": None,
        "input_shape": (3, 224, 224),
        "output_shape": (256, 4096),
        "max_batch": 9,
    }
    wanted = dataclasses.replace(METADATA, **{field: others.get(field, "something else")})
    assert artifact.is_current(sealed(tmp_path), METADATA)
    assert not artifact.is_current(tmp_path, wanted)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.plan").unlink(),
        lambda folder: (folder / "model.plan").write_bytes(b"a pla"),
        lambda folder: (folder / "model.plan").write_bytes(b"b plan"),
        lambda folder: (folder / artifact.METADATA).unlink(),
        lambda folder: (folder / artifact.METADATA).write_text("{"),
        lambda folder: (folder / artifact.METADATA).write_text("[]"),
    ],
    ids=["no plan", "cut short", "exchanged", "no metadata", "half metadata", "other metadata"],
)
def test_damaged_engine_does_not_look_current(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    sealed(tmp_path)
    damage(tmp_path)
    assert not artifact.is_current(tmp_path, METADATA)
