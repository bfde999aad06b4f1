"""A checkpoint that cannot be served is refused in one sentence that says what would do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_export.cli import main
from tests.checkpoints import tiny_llava

Change = Callable[[Path], None]


def with_fields(file: str, **fields: Any) -> Change:
    """Fields of a JSON file, some inside of others: `text_config__model_type`; None: without."""

    def change(checkpoint: Path) -> None:
        values = json.loads((checkpoint / file).read_text())
        for path, value in fields.items():
            *outer, name = path.split("__")
            place = values
            for each in outer:
                place = place[each]
            if value is None:
                del place[name]
            else:
                place[name] = value
        (checkpoint / file).write_text(json.dumps(values))

    return change


def config(**fields: Any) -> Change:
    return with_fields("config.json", **fields)


def original(name: str) -> Change:
    """The layout of the original code's checkpoints."""

    def change(checkpoint: Path) -> None:
        fields = {
            "_name_or_path": name,
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava_llama",
            "mm_vision_tower": "openai/clip-vit-large-patch14-336",
            "mm_projector_type": "mlp2x_gelu",
        }
        (checkpoint / "config.json").write_text(json.dumps(fields))

    return change


def without_template(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()


def with_a_template_that_says_video(checkpoint: Path) -> None:
    file = checkpoint / "chat_template.jinja"
    shown = "{%- for part in message['content'] if part['type'] == "
    template = file.read_text()
    assert shown in template
    other = f"{shown}'video' -%}}{{{{- 'A video: <video>' -}}}}{{%- endfor -%}}{shown}"
    file.write_text(template.replace(shown, other, 1))


def quantized(by: str) -> Change:
    return config(quantization_config={"quant_method": by, "load_in_4bit": True})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "llava": tiny_llava(folder / "llava"),
        "llava_next": tiny_llava(folder / "llava_next", family="llava_next"),
        "llava_next_video": tiny_llava(folder / "llava_next_video", family="llava_next_video"),
        "llava_onevision": tiny_llava(
            folder / "llava_onevision", family="llava_onevision", vision="siglip", text="qwen2"
        ),
    }


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        (
            "llava",
            original("liuhaotian/llava-v1.5-13b"),
            ["layout of the original LLaVA code", "give llava-hf/llava-1.5-13b-hf"],
        ),
        (
            "llava",
            original("liuhaotian/llava-v1.6-mistral-7b"),
            ["layout of the original LLaVA code", "give llava-hf/llava-v1.6-mistral-7b-hf"],
        ),
        (
            "llava",
            original("somebody/their-own"),
            ["layout of the original LLaVA code", "huggingface.co/llava-hf"],
        ),
        ("llava", quantized("bitsandbytes"), ["quantized by bitsandbytes", '"weights": "int4"']),
        ("llava_next", quantized("awq"), ["quantized by awq", "give the one it was made from"]),
        ("llava_onevision", quantized("gptq"), ["quantized by gptq"]),
        ("llava", config(quantization_config="text"), ["quantization_config is not understood"]),
        (
            "llava",
            config(
                quantization_config={
                    "quant_method": "compressed-tensors",
                    "format": "pack-quantized",
                    "config_groups": {"group_0": None},
                }
            ),
            ["quantization_config is not understood"],
        ),
        (
            "llava",
            config(model_type="video_llava"),
            ["of type 'video_llava'", "llava, llava_next, llava_next_video, llava_onevision"],
        ),
        (
            "llava_next",
            config(vision_config__model_type="dinov2"),
            ["vision tower is of the type 'dinov2'", "clip_vision_model, siglip_vision_model"],
        ),
        (
            "llava",
            config(text_config__model_type="gemma"),
            ["text model is of the family 'gemma'", "llama, mistral, qwen2"],
        ),
        (
            "llava_next",
            config(vision_config__patch_size=None),
            ["for patches of 14 pixels a side and config.json has 32", 'set "patch_size": 14'],
        ),
        ("llava_onevision", without_template, ["has no chat template", "chat_template.jinja"]),
        (
            "llava_next",
            with_fields("preprocessor_config.json", image_grid_pinpoints=[[56, 56]]),
            ["cuts pictures into other tiles"],
        ),
        (
            "llava_next",
            config(vision_feature_select_strategy="full"),
            ["makes 17 tokens of a tile of 4 x 4 patches", "is 'default' for CLIP"],
        ),
        (
            "llava_onevision",
            config(vision_aspect_ratio="pad"),
            ["vision_aspect_ratio is 'pad'", "anyres_max_9"],
        ),
        (
            "llava_next",
            config(vision_feature_select_strategy="some"),
            ["config.json cannot be read", "vision_feature_select_strategy"],
        ),
        (
            "llava_next_video",
            config(spatial_pool_mode="conv"),
            ["spatial_pool_mode is 'conv'", "served are average, max"],
        ),
        (
            "llava_next_video",
            with_fields("video_preprocessor_config.json", crop_size={"height": 224, "width": 224}),
            ["its video processor makes frames of (224, 224) pixels", "takes 56 a side"],
        ),
        (
            "llava_onevision",
            with_fields("video_preprocessor_config.json", resample=0),
            ["no usable video processor (its resample is 0"],
        ),
        (
            "llava_onevision",
            with_a_template_that_says_video,
            ["chat template that shows a video otherwise than a picture"],
        ),
    ],
)
def test_refused_in_one_sentence(
    checkpoints: dict[str, Path],
    family: str,
    change: Change,
    said: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = Path(shutil.copytree(checkpoints[family], tmp_path / "checkpoint"))
    change(checkpoint)
    assert main(["--model", str(checkpoint), "--output", str(tmp_path / "repository")]) == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("error: ")
    assert sentence.count("\n") == 1
    for each in said:
        assert each in sentence
    assert not (tmp_path / "repository").exists()


def test_a_hub_name_of_the_original_layout_names_the_converted_one(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The downloaded folder is named by a commit; what was asked for says which one it is."""
    snapshot = Path(shutil.copytree(checkpoints["llava"], tmp_path / ("0" * 40)))
    original("./checkpoints/vicuna")(snapshot)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    command = ["--model", "liuhaotian/llava-v1.5-7b", "--output", str(tmp_path / "repository")]
    assert main(command) == 2
    assert "give llava-hf/llava-1.5-7b-hf" in capsys.readouterr().err


def test_the_processors_patch_size_may_be_missing(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Older published checkpoints have none: tokens are measured here, not computed from it."""
    checkpoint = Path(shutil.copytree(checkpoints["llava_next"], tmp_path / "checkpoint"))
    with_fields("processor_config.json", patch_size=None)(checkpoint)
    assert main(["--model", str(checkpoint), "--output", str(tmp_path / "repository")]) == 0
