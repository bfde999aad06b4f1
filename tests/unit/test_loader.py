"""A checkpoint's weights on their way from the disk to where they are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from demo.random_checkpoint import write_random_llava
from llava_triton.checkpoint.loader import load_checkpoint
from llava_triton.checkpoint.weights import PIECE_BYTES, CheckpointError, CheckpointWeights
from llava_triton.model.text_model import TextModel
from tests.checkpoints import tiny_llava
from tests.conftest import ROOT
from tests.engine.test_text_model import VISION

MIB = 1 << 20
TENSORS = {
    "F64": torch.randn(3, 5, dtype=torch.float64),
    "F32": torch.randn(7),
    "F16": torch.randn(4, 4).half(),
    "BF16": torch.randn(2, 3, 4).bfloat16(),
}


def stored(folder: Path) -> CheckpointWeights:
    save_file(TENSORS | {"bytes": torch.zeros(3, dtype=torch.int8)}, folder / "model.safetensors")
    return CheckpointWeights(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_float_type_is_read_into_every_other(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = stored(tmp_path)
    for piece in (PIECE_BYTES, 16):
        monkeypatch.setattr("llava_triton.checkpoint.weights.PIECE_BYTES", piece)
        for name, tensor in TENSORS.items():
            read = torch.full(tensor.shape, torch.nan, dtype=dtype)
            weights.read_into(name, read)
            assert torch.equal(read, tensor.to(dtype)), name


def test_what_is_no_weight_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    weights = stored(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"bytes in .* is stored as I8; weights are read from"
    ):
        weights.read_into("bytes", torch.zeros(3))
    with pytest.raises(CheckpointError, match=r"F32 in .* is \[7\], and the model needs \[8\]"):
        weights.read_into("F32", torch.zeros(8))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:8])
    with pytest.raises(CheckpointError, match=r"model.safetensors ended amid F32; give an intact"):
        weights.read_into("F32", torch.zeros(7))


@pytest.mark.parametrize("kept", [True, False])
def test_a_tied_output_is_the_embedding(kept: bool, tmp_path: Path) -> None:
    checkpoint = write_random_llava(
        tmp_path / "model",
        VISION,
        LlamaConfig,
        {"hidden_size": 32, "num_attention_heads": 2}
        | {"intermediate_size": 48, "num_hidden_layers": 1, "num_key_value_heads": 2},
    )
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    (head,) = (name for name in tensors if name.endswith("lm_head.weight"))
    (table,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[head] = tensors[table].clone()
    if not kept:
        del tensors[head]
    save_file(tensors, file)
    config = checkpoint / "config.json"
    config.write_text(
        config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    )
    model = TextModel(load_checkpoint(checkpoint))
    hidden = torch.randn(2, 32)
    torch.testing.assert_close(model.logits(hidden), hidden @ model.embedding.T)


def test_the_vision_tower_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny_llava(tmp_path / "model")
    read: list[str] = []
    read_into = CheckpointWeights.read_into

    def noted(self: CheckpointWeights, name: str, target: torch.Tensor) -> None:
        read.append(name)
        read_into(self, name, target)

    monkeypatch.setattr(CheckpointWeights, "read_into", noted)
    TextModel(load_checkpoint(checkpoint))
    assert read
    assert not [name for name in read if name.startswith(("vision_tower", "multi_modal"))]
    assert len(read) == len(set(read))


PEAK = """
import resource, sys, torch
from pathlib import Path
from llava_triton.checkpoint.loader import load_checkpoint
from llava_triton.model.text_model import TextModel

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

dtype = getattr(torch, sys.argv[2])
checkpoint = load_checkpoint(Path(sys.argv[1]), dtype=dtype)
before = peak()
model = TextModel(checkpoint)
print(peak() - before)
"""


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A checkpoint, and the parameters of its text model."""
    text = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12}
    text |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    folder = tmp_path_factory.mktemp("larger") / "model"
    checkpoint = write_random_llava(folder, VISION, LlamaConfig, text, least_deviation=0.0)
    tensors = load_file(checkpoint / "model.safetensors")
    return checkpoint, sum(each.numel() for name, each in tensors.items() if "vision" not in name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_takes_little_more_than_the_model(
    dtype: torch.dtype, larger: tuple[Path, int]
) -> None:
    checkpoint, parameters = larger
    command = [sys.executable, "-c", PEAK, str(checkpoint), str(dtype).removeprefix("torch.")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    # Besides: a layer that is being packed, a piece of a file, torch's own buffers.
    assert int(done.stdout) < parameters * dtype.itemsize + PIECE_BYTES + 48 * MIB
