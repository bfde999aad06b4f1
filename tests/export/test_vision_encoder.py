"""The exported graphs against transformers, and what the comparison lets through."""

from __future__ import annotations

import dataclasses
import json
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import tritonclient.grpc as grpc
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from llava_export.errors import ExportError
from llava_export.mixed_precision import to_mixed_precision
from llava_export.onnx_export import export_onnx
from llava_export.report import compare, onnx_encoder
from llava_triton.checkpoint.configuration import llava_config
from llava_triton.checkpoint.families import VideoFamily, family_of
from llava_triton.checkpoint.vision_tower import (
    VisionEncoder,
    features_shape,
    load_vision_encoder,
)
from llava_triton.checkpoint.weights import CheckpointError, CheckpointWeights
from llava_triton.contract.settings import Settings
from llava_triton.pictures.torch_tower import TorchEncoding
from llava_triton.pictures.tower import vision_encoding
from tests.checkpoints import DEMO, tiny_llava
from tests.reference import load_reference


def load(checkpoint: Path) -> VisionEncoder:
    return load_vision_encoder(llava_config(checkpoint), CheckpointWeights(checkpoint))


def noise(batch: int, side: int) -> np.ndarray:
    return np.random.default_rng(batch).standard_normal((batch, 3, side, side), dtype=np.float32)


def transformers_features(checkpoint: Path, pixels: np.ndarray) -> np.ndarray:
    """What plain transformers gives, by the checkpoint's own feature selection."""
    model = load_reference(checkpoint)
    with torch.inference_mode():
        output = model.model.get_image_features(
            pixel_values=torch.from_numpy(pixels),
            vision_feature_layer=model.config.vision_feature_layer,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        )
    return torch.stack(list(output.pooler_output)).numpy()


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, in units of the expected values' root mean square."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.sqrt(np.mean(expected**2)))


@pytest.fixture(scope="module")
def several_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of another picture size that takes two layers and keeps the class token."""
    return tiny_llava(
        tmp_path_factory.mktemp("checkpoints") / "several layers",
        image_size=70,
        seed=3,
        vision_feature_layer=[-3, -1],
        vision_feature_select_strategy="full",
    )


def test_graph_gives_transformers_features_for_any_batch(
    several_layers: Path, tmp_path: Path
) -> None:
    graph = tmp_path / "model.onnx"
    export_onnx(load(several_layers), 70, graph)
    encode = onnx_encoder(graph)
    for batch in (1, 2, 5):
        pixels = noise(batch, 70)
        expected = transformers_features(several_layers, pixels)
        assert expected.shape == (batch, 26, 64)  # 5 x 5 patches and the class token
        assert error(encode(pixels), expected) < 1e-4
    assert features_shape(llava_config(several_layers), 70) == (26, 64)


@pytest.mark.parametrize(("side", "pool"), [(56, "average"), (70, "max")])
def test_a_graph_gives_the_features_of_frames_behind_those_of_tiles(
    side: int, pool: str, tmp_path: Path
) -> None:
    checkpoint = tiny_llava(
        tmp_path / "checkpoint",
        family="llava_next_video",
        image_size=side,
        spatial_pool_mode=pool,
    )
    graph = tmp_path / "model.onnx"
    export_onnx(load(checkpoint), side, graph)
    config, model = llava_config(checkpoint), load_reference(checkpoint).model
    patches, half = (side // 14) ** 2, (side // 28) ** 2
    assert features_shape(config, side) == (patches + half, 64)
    for batch in (1, 3):
        pixels = noise(batch, side)
        features = onnx_encoder(graph)(pixels)
        with torch.inference_mode():
            frames = model.get_video_features(torch.from_numpy(pixels)[None]).pooler_output[0]
            tower = model.vision_tower(torch.from_numpy(pixels), output_hidden_states=True)
            tiles = model.multi_modal_projector(tower.hidden_states[-2][:, 1:])
        assert error(features[:, :patches], tiles.numpy()) < 1e-4
        family = family_of(config)
        assert isinstance(family, VideoFamily)
        rows = family.video_rows(torch.from_numpy(features), None)
        assert error(rows.numpy(), frames.numpy()) < 1e-4
        half_types = to_mixed_precision(load(checkpoint))(torch.from_numpy(pixels))
        assert error(half_types.numpy(), features) < 0.05


def test_demo_graph_in_the_repository_gives_transformers_features(demo_repository: Path) -> None:
    folder = demo_repository / "vision_encoder" / "1"
    pixels = noise(3, 96)
    expected = transformers_features(DEMO, pixels)
    assert error(onnx_encoder(folder / "model.onnx")(pixels), expected) < 1e-4
    report = json.loads((folder / "report.json").read_text())
    assert report["passed"]
    assert {row["batch"] for row in report["rows"]} == {1, 3, 8}
    assert max(row["max_scaled"] for row in report["rows"]) < 1e-4


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8])
def test_torch_in_the_place_of_the_graph_gives_the_same_features(
    several_layers: Path, batch: int
) -> None:
    # 3 is filled up, 5 is more than there are at once, 8 too. What is left of an earlier, larger
    # batch must not show.
    encoding = TorchEncoding(several_layers, torch.device("cpu"), torch.float32, max_batch=4)
    encoding(noise(4, 70))
    pixels = noise(batch, 70)
    features = encoding(pixels)
    assert features.dtype == torch.float32
    assert error(features.numpy(), transformers_features(several_layers, pixels)) < 1e-5
    encoding(noise(4, 70) + 1)
    again = encoding(pixels)
    assert torch.equal(features, again)  # nor does a later one write over what was returned


def test_torch_in_a_half_type_gives_what_transformers_gives_in_it(several_layers: Path) -> None:
    encoding = TorchEncoding(several_layers, torch.device("cpu"), torch.bfloat16, max_batch=2)
    pixels = noise(2, 70)
    expected = transformers_features(several_layers, pixels)
    assert 1e-4 < error(encoding(pixels).numpy(), expected) < 0.1


@pytest.mark.parametrize("driver", [False, True])
def test_without_a_gpu_the_exported_graph_is_chosen(
    driver: bool, demo_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.of_repository(demo_repository)
    monkeypatch.setattr("llava_triton.pictures.tower.has_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    encoding = vision_encoding(demo_repository, settings)
    assert encoding.name.startswith("ONNX Runtime")
    assert error(encoding(noise(2, 96)), transformers_features(DEMO, noise(2, 96))) < 1e-4


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU here; the same encoding is compared on the CPU above, unrecorded",
)
def test_with_a_gpu_torch_is_chosen(demo_repository: Path) -> None:
    settings = dataclasses.replace(Settings.of_repository(demo_repository), dtype="float32")
    encoding = vision_encoding(demo_repository, settings)
    assert encoding.name.startswith("torch")
    for batch in (1, 3, 8):
        features = encoding(noise(batch, 96))
        assert features.is_cuda
        expected = transformers_features(DEMO, noise(batch, 96))
        assert error(features.cpu().numpy(), expected) < 1e-3


def test_server_batches_waiting_pictures_and_gives_each_request_its_own(
    grpc_client: grpc.InferenceServerClient, demo_repository: Path
) -> None:
    encode = onnx_encoder(demo_repository / "vision_encoder" / "1" / "model.onnx")
    batches = [noise(batch, 96) for batch in (1, 3, 2) * 8]
    expected = [encode(pixels) for pixels in batches]
    tensors = [grpc.InferInput("pixel_values", pixels.shape, "FP32") for pixels in batches]
    for tensor, pixels in zip(tensors, batches, strict=True):
        tensor.set_data_from_numpy(pixels)

    def together() -> bool:
        """All at once: whether some of them became one batch, as those do that wait."""
        before = executions(grpc_client)
        arrived: queue.SimpleQueue[tuple[int, Any, Any]] = queue.SimpleQueue()
        for index, tensor in enumerate(tensors):
            grpc_client.async_infer(
                "vision_encoder",
                [tensor],
                lambda result, error, index=index: arrived.put((index, result, error)),
            )
        for _ in batches:
            index, result, failure = arrived.get(timeout=60)
            assert failure is None, str(failure)
            assert error(result.as_numpy("image_features"), expected[index]) < 1e-4
        return executions(grpc_client) - before < len(batches)

    assert any(together() for _ in range(20))  # how fast they come is chance


def executions(client: grpc.InferenceServerClient) -> int:
    """Of the vision encoder, so far."""
    statistics = client.get_inference_statistics("vision_encoder").model_stats[0]
    return int(statistics.execution_count)


def element_types(graph: onnx.GraphProto) -> dict[str, int]:
    values = [*graph.value_info, *graph.input, *graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {weight.name: weight.data_type for weight in graph.initializer}


def test_mixed_precision_keeps_sensitive_operations_in_float32(
    several_layers: Path, tmp_path: Path
) -> None:
    file = tmp_path / "model.onnx"
    export_onnx(to_mixed_precision(load(several_layers)), 70, file)
    model = onnx.shape_inference.infer_shapes(onnx.load(file))
    types = element_types(model.graph)
    operations: dict[str, set[int]] = {}
    for node in model.graph.node:
        operations.setdefault(node.op_type, set()).add(types[node.input[0]])
    half, single = {onnx.TensorProto.FLOAT16}, {onnx.TensorProto.FLOAT}
    assert operations["MatMul"] == operations["Conv"] == half
    for sensitive in ("LayerNormalization", "Softmax", "Sigmoid", "Gelu"):
        assert operations[sensitive] == single, sensitive
    assert types["pixel_values"] == types["image_features"] == onnx.TensorProto.FLOAT
    halves = [weight for weight in model.graph.initializer if weight.data_type in half]
    assert sum(np.prod(weight.dims) for weight in halves) > 0.9 * sum(
        np.prod(weight.dims) for weight in model.graph.initializer
    )


def test_mixed_precision_computes_what_float16_products_give(several_layers: Path) -> None:
    encoder = load(several_layers)
    mixed = to_mixed_precision(encoder)
    pixels = noise(2, 70)
    expected = transformers_features(several_layers, pixels)
    with torch.inference_mode():
        rounded = mixed(torch.from_numpy(pixels)).numpy()
        unchanged = encoder(torch.from_numpy(pixels)).numpy()
        # The same product by the CPU's own float16 kernel.
        linear = mixed.multi_modal_projector.linear_1
        values = torch.randn(7, linear.in_features)
        native = torch.nn.functional.linear(values.half(), linear.weight, linear.bias).float()
        assert torch.allclose(linear(values), native, rtol=2e-3, atol=2e-3)
    assert error(unchanged, expected) == 0  # the copy left the original alone
    assert 1e-5 < error(rounded, expected) < 5e-2


def test_weights_beyond_the_limit_of_protobuf_go_to_a_file_beside(
    several_layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_export.onnx_export._SINGLE_FILE_BYTES", 1000)
    graph = tmp_path / "model.onnx"
    export_onnx(load(several_layers), 70, graph)
    assert (tmp_path / "model.onnx.data").stat().st_size > graph.stat().st_size / 2
    pixels = noise(1, 70)
    assert error(onnx_encoder(graph)(pixels), transformers_features(several_layers, pixels)) < 1e-4


@pytest.mark.parametrize(
    ("fault", "precision"),
    [
        (lambda features: features + 1e-3, "fp32"),
        (lambda features: features * 1.2, "fp16"),
        (lambda features: np.where(features > 1, np.nan, features), "fp16"),
        (lambda features: features[:, ::-1], "fp32"),
    ],
    ids=["offset", "scale", "NaN", "order"],
)
def test_encoder_out_of_tolerance_is_refused(
    fault: Callable[[np.ndarray], np.ndarray], precision: str
) -> None:
    def features(pixels: np.ndarray) -> np.ndarray:
        return pixels.reshape(len(pixels), 16, -1)

    def report(encode: Callable[[np.ndarray], np.ndarray]) -> Any:
        return compare(
            features,
            {"it": encode},
            AutoProcessor.from_pretrained(DEMO).image_processor,
            max_batch=2,
            precision=precision,
            note="a test",
        )

    report(features).require()
    with pytest.raises(ExportError, match="too far from PyTorch"):
        report(lambda pixels: fault(features(pixels))).require()


def change_weights(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("vision_tower.vision_model.pre_layrnorm.bias"),
            "1 missing .*vision_tower.pre_layrnorm.bias",
        ),
        (
            lambda tensors: tensors.pop("language_model.model.layers.1.mlp.up_proj.weight"),
            "1 missing .*layers.1.mlp.up_proj.weight",
        ),
        (
            lambda tensors: tensors.update({"multi_modal_projector.linear_3.bias": torch.ones(4)}),
            "1 unexpected .*linear_3.bias",
        ),
        (
            lambda tensors: tensors.update({"multi_modal_projector.linear_1.bias": torch.ones(4)}),
            "1 of the wrong shape .*linear_1.bias",
        ),
    ],
    ids=["vision", "language", "unexpected", "shape"],
)
def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    checkpoint = tiny_llava(tmp_path / "checkpoint")
    load(checkpoint)
    change_weights(checkpoint, change)
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


def test_every_release_of_transformers_names_the_same_weights(tmp_path: Path) -> None:
    published = tiny_llava(tmp_path / "published", text="mistral", kv_heads=2)
    load_reference(published).save_pretrained(tmp_path / "current")
    pixels = torch.from_numpy(noise(1, 56))
    with torch.inference_mode():
        assert torch.equal(load(published)(pixels), load(tmp_path / "current")(pixels))


def test_hash_tells_vision_weights_apart_and_ignores_the_language_model(tmp_path: Path) -> None:
    checkpoint = tiny_llava(tmp_path / "checkpoint")
    first = CheckpointWeights(checkpoint).vision_sha256()
    change_weights(checkpoint, lambda tensors: tensors["language_model.lm_head.weight"].add_(1))
    assert CheckpointWeights(checkpoint).vision_sha256() == first
    change_weights(
        checkpoint, lambda tensors: tensors["multi_modal_projector.linear_2.bias"].add_(1)
    )
    assert CheckpointWeights(checkpoint).vision_sha256() != first


def test_damaged_weights_are_one_clear_error(tmp_path: Path) -> None:
    checkpoint = tiny_llava(tmp_path / "checkpoint")
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="shorter than its header says"):
        CheckpointWeights(checkpoint)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        CheckpointWeights(checkpoint)
