"""What the benchmark holds its figures against: rates of the hardware, and a model's needs."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from benchmarks import limits
from benchmarks.limits import (
    decode_step_bytes,
    kv_bytes_per_token,
    measure_limits,
    prefill_flops,
    weight_bytes,
)
from benchmarks.workload import LLAVA_15_7B, LLAVA_16_MISTRAL_7B, QUICK, Geometry, write_checkpoint
from demo.random_checkpoint import DEMO
from tests.engine_harness import EngineHarness

GEOMETRY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "every head its own": LlamaConfig(**GEOMETRY, num_key_value_heads=4),
    "grouped": MistralConfig(**GEOMETRY, num_key_value_heads=2, sliding_window=None),
    "wide heads": LlamaConfig(**GEOMETRY, num_key_value_heads=1, head_dim=32),
    "biased": Qwen2Config(**GEOMETRY, num_key_value_heads=2),
}


def model_of(config: Any) -> Any:
    # The plain attention: what it multiplies is counted product by product.
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> Any:
    return CONFIGS[request.param]


def test_weights_and_kept_tokens_are_counted_as_transformers_has_them(config: Any) -> None:
    model = model_of(config)
    matrices = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and "embed_tokens" not in name
    )
    assert weight_bytes(config, 2) == 2 * matrices
    cache: Any = DynamicCache(config=config)
    with torch.inference_mode():
        model(input_ids=torch.arange(7)[None], past_key_values=cache)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert 7 * kv_bytes_per_token(config, 4) == kept
    step = decode_step_bytes(config, [7, 5], bytes_per_weight=4, bytes_per_value=4)
    assert step == 4 * matrices + kept * 12 / 7


@pytest.mark.parametrize(("new", "context"), [(1, 0), (1, 9), (6, 0), (6, 9)])
def test_flops_are_those_of_transformers_less_what_causality_spares(
    config: Any, new: int, context: int
) -> None:
    model = model_of(config)
    cache: Any = DynamicCache(config=config)
    ids = torch.arange(new + context)[None]
    with torch.inference_mode():
        if context:
            model(input_ids=ids[:, :context], past_key_values=cache)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids[:, context:], past_key_values=cache, logits_to_keep=1)
    # transformers multiplies every new query by every new key, later ones too; some releases also
    # make the angles of the positions by a product.
    later_keys = new * (new - 1) / 2
    head_dim = getattr(config, "head_dim", None) or 16
    spared = 4 * 3 * 4 * head_dim * later_keys
    angles = 2 * new * head_dim // 2
    more = counter.get_total_flops() - prefill_flops(config, new, context)
    assert more in (spared, spared + angles)


def test_a_prompt_in_pieces_costs_as_much_but_for_the_logits(config: Any) -> None:
    whole = prefill_flops(config, 40)
    pieces = prefill_flops(config, 25) + prefill_flops(config, 15, 25)
    assert pieces - whole == 2 * 300 * 64


def test_seven_billion_weights() -> None:
    llama, mistral = (
        geometry.family(**geometry.text) for geometry in (LLAVA_15_7B, LLAVA_16_MISTRAL_7B)
    )
    # Published: 6.74 and 7.24 billion, of which 0.13 are the embeddings.
    assert weight_bytes(llama, 1) == pytest.approx(6.607e9, rel=1e-3)
    assert weight_bytes(mistral, 1) == pytest.approx(7.111e9, rel=1e-3)
    assert kv_bytes_per_token(llama, 2) == 512 * 1024
    assert kv_bytes_per_token(mistral, 2) == 128 * 1024


def test_rates_count_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(device: torch.device, run: Any) -> float:
        run()
        return 0.5

    monkeypatch.setattr(limits, "_fastest_seconds", once)
    monkeypatch.setattr(limits, "_cache_bytes", lambda: 1 << 20)
    threads = torch.get_num_threads()
    measured = measure_limits(torch.device("cpu"), torch.bfloat16, threads=1)
    assert measured.read_bytes_per_second == 2 * 4 * (1 << 20)
    assert measured.copy_bytes_per_second == 2 * measured.read_bytes_per_second
    assert measured.memory_bytes_per_second == measured.copy_bytes_per_second
    assert measured.matrix_flops_per_second == 2 * 2 * 1536**3
    assert (measured.dtype, measured.threads) == ("bfloat16", 1)
    assert measured.host_copy_bytes_per_second is None
    assert torch.get_num_threads() == threads


def test_the_fastest_of_several_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = itertools.cycle([9.0, 2.0, 7.0])
    monkeypatch.setattr(limits, "_seconds", lambda run: next(times))
    monkeypatch.setattr(limits, "SECONDS", 0.01)
    assert limits._fastest_seconds(torch.device("cpu"), lambda: None) == 2.0


@pytest.mark.parametrize("geometry", [LLAVA_15_7B, LLAVA_16_MISTRAL_7B])
def test_a_vocabulary_beyond_the_tokenizers_does_no_harm(
    geometry: Geometry, tmp_path: Path
) -> None:
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    tiny = dataclasses.replace(
        geometry,
        text=geometry.text | small | {"num_attention_heads": 8, "num_key_value_heads": 2},
        vision=QUICK.vision,
    )
    checkpoint = write_checkpoint(tmp_path / "model", tiny, torch.bfloat16)
    harness = EngineHarness(checkpoint, dtype="bfloat16")
    try:
        text, final = harness.ask(
            "s", "What is it?", start=True, max_tokens=12, temperature=0.0, ignore_eos=True
        )
        assert final.num_output_tokens == 12
        history = harness.engine._sessions.get("s").history
    finally:
        harness.shutdown()
    assert max(history) < len(AutoTokenizer.from_pretrained(DEMO))
    assert len(text.replace(" ", "")) >= 12  # every token is readable
