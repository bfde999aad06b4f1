"""What the benchmark holds its figures against: rates of the hardware, and a model's needs."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)

from benchmarks import limits, plots
from benchmarks.distance import Ceiling, distance_text, distances
from benchmarks.limits import (
    Limits,
    best_of,
    decode_step_bytes,
    kv_bytes_per_token,
    layer_weights,
    measure_limits,
    prefill_flops,
    vision_flops,
    weight_bytes,
)
from benchmarks.load import Load, TurnTimes
from benchmarks.report import rows
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

    monkeypatch.setattr(limits, "fastest_seconds", once)
    monkeypatch.setattr(limits, "cache_bytes", lambda: 1 << 20)
    threads = torch.get_num_threads()
    measured = measure_limits(torch.device("cpu"), torch.bfloat16, threads=1)
    assert measured.read_bytes_per_second == 2 * 4 * (1 << 20)
    assert measured.copy_bytes_per_second == 2 * measured.read_bytes_per_second
    assert measured.memory_bytes_per_second == measured.copy_bytes_per_second
    assert measured.matrix_flops_per_second == 2 * 2 * 1536**3
    assert (measured.dtype, measured.threads) == ("bfloat16", 1)
    assert measured.host_copy_bytes_per_second is None
    assert torch.get_num_threads() == threads


def test_the_best_of_several_measurements_is_the_limit() -> None:
    # In the second one the memory was slow, and the matrices fast.
    best = best_of([rates("float32", 2e6, 1e6, 2), rates("float32", 1e6, 4e6, 2)])
    assert best == rates("float32", 2e6, 4e6, 2)


def test_the_fastest_of_several_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = itertools.cycle([9.0, 2.0, 7.0])
    monkeypatch.setattr(limits, "seconds_of", lambda run: next(times))
    monkeypatch.setattr(limits, "SECONDS", 0.01)
    assert limits.fastest_seconds(torch.device("cpu"), lambda: None) == 2.0


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_the_encoders_flops_are_those_of_transformers(strategy: str) -> None:
    llava = LlavaConfig(
        vision_config=CLIPVisionConfig(**QUICK.vision),
        text_config=CONFIGS["grouped"],
        vision_feature_layer=-1,
        vision_feature_select_strategy=strategy,
    )
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration._from_config(llava, attn_implementation="eager")
    pixels = torch.empty(1, 3, 56, 56, device="meta")
    with FlopCounterMode(display=False) as counter:
        model.get_image_features(pixel_values=pixels)
    assert vision_flops(llava) == counter.get_total_flops()
    # transformers computes all layers, whichever is used.
    llava.vision_feature_layer = -2
    layer = 2 * 17 * (4 * 48**2 + 2 * 48 * 96) + 4 * 17**2 * 48
    assert vision_flops(llava) == counter.get_total_flops() - layer
    llava.vision_feature_layer = [1, -2]
    tokens = 16 if strategy == "default" else 17
    assert vision_flops(llava) == counter.get_total_flops() - layer + 2 * tokens * 48 * 64


def rates(dtype: str, memory: float, matrices: float, threads: int | None) -> Limits:
    return Limits("a device", dtype, threads, memory, memory / 2, matrices, None, None)


def test_rows_are_held_against_the_bytes_and_flops_of_their_dtype() -> None:
    llava = LlavaConfig(
        vision_config=CLIPVisionConfig(**QUICK.vision), text_config=CONFIGS["grouped"]
    )
    text = llava.text_config
    limits = {"float32": rates("float32", 2e6, 1e6, 2), "bfloat16": rates("bfloat16", 1e6, 4e6, 2)}
    ceiling = Ceiling(llava, limits)
    # The memory is one for both.
    assert ceiling.decode_ms("bfloat16", 4, 10) == decode_step_bytes(text, [10] * 4) / 2e3
    whole = decode_step_bytes(text, [10], bytes_per_weight=4, bytes_per_value=4)
    assert ceiling.decode_ms("float32", 1, 10) == whole / 2e3
    # A CPU encodes pictures in float32; of three openings, two must be computed for the median.
    opening = vision_flops(llava) / 1e3 + prefill_flops(text, 30) / 4e3
    assert ceiling.opening_ms("bfloat16", 1, 30) == pytest.approx(opening)
    assert ceiling.opening_ms("bfloat16", 3, 30) == pytest.approx(2 * opening)
    gpu = Ceiling(llava, {"bfloat16": rates("bfloat16", 1e6, 4e6, None)})
    opening = (vision_flops(llava) + prefill_flops(text, 30)) / 4e3
    assert gpu.opening_ms("bfloat16", 1, 30) == pytest.approx(opening)
    turns = [TurnTimes(0, turn, 100.0, 8.0, 4, 0, 30 + 20 * turn, "red") for turn in range(2)]
    table = rows([{"E": [Load(1, 1.0, 1.0, turns)]}], {"E": "engine"})
    (far,) = distances(table, {"E": "float32"}, {"E": "unrounded"}, ceiling)
    for weights, fewer in (("int8", 3.0), ("int4", 4 - 0.546875)):  # bytes of each of a layer
        (integers,) = distances(table, {"E": "float32"}, {"E": weights}, ceiling)
        milliseconds = layer_weights(text) * fewer / 2e3
        assert integers.decode_limit_ms == pytest.approx(far.decode_limit_ms - milliseconds)
    assert far.mean_context == 42
    assert far.decode_share == ceiling.decode_ms("float32", 1, 42) / 8.0
    assert far.opening_share == ceiling.opening_ms("float32", 1, 30) / 100.0
    told = distance_text([far], ceiling)
    assert f"{far.decode_share:.1%}" in told
    assert f"{far.opening_share:.1%}" in told


def results(path: Path, **changes: Any) -> Path:
    """Such as `make bench` writes; T has no time between tokens, all having come at once."""
    counts = [("K", 1, 0.2), ("T", 1, float("nan")), ("T", 4, 0.4)]
    values = {
        "quick": False,
        "about": {"device": "a device", "geometry": "cpu", "date": "2026-01-31"},
        "rows": [
            {
                "way": way,
                "title": way,
                "sessions": count,
                "first_token_by_turn_ms": [400.0, 50.0, 60.0],
                "first_token_first_turn_ms": 400.0,
                "first_token_later_turns_ms": 55.0,
                "tokens_per_second": 20.0 * count,
            }
            for way, count, _ in counts
        ],
        "distances": [
            {
                "way": way,
                "title": way,
                "sessions": count,
                "decode_share": share,
                "opening_share": 0.3,
            }
            for way, count, share in counts
        ],
    }
    path.write_text(json.dumps(values | changes))
    return path


def test_plots_are_drawn_again_from_the_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = results(tmp_path / "some.json")
    assert plots.main([str(file)]) == 0
    names = [f"some-{name}.png" for name in ("first-token", "openings", "throughput", "limits")]
    assert sorted(names) == sorted(each.name for each in tmp_path.glob("*.png"))
    told = capsys.readouterr().out
    orange = tuple(int(plots.LOOKS["T"][0][at : at + 2], 16) for at in (1, 3, 5))
    for name in names:
        assert name in told
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert pixels.shape[1] >= 800
        assert (pixels == orange).all(axis=2).sum() > 500  # T's line is there


def test_results_of_an_older_release_are_not_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.json").write_text('{"rows": []}')
    assert plots.main([str(tmp_path / "old.json")]) == 2
    assert "has no about, quick: it was not written by this" in capsys.readouterr().err
    assert plots.main([str(tmp_path / "none.json")]) == 2
    assert "cannot be read as JSON" in capsys.readouterr().err


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
        history = harness.history("s")
    finally:
        harness.shutdown()
    assert max(history) < len(AutoTokenizer.from_pretrained(DEMO))
    assert len(text.replace(" ", "")) >= 12  # every token is readable
