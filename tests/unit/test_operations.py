"""Dashboard and alerts ask for metrics that the servers publish."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from llava_sagemaker.adapter.metrics import AdapterMetrics, joined

from llava_triton.contract.settings import Settings
from llava_triton.conversation.prompt import CompletedTurn, Span
from llava_triton.engine.statistics import Statistics
from llava_triton.journal.records import Record, encode
from llava_triton.journal.writer import JournalCounters
from llava_triton.kernels.base import BLOCK_TOKENS
from llava_triton.model.memory_size import (
    CONTEXT_BYTES,
    GpuNeeds,
    blocks_for,
    check_blocks,
    features_budget,
    gpu_budget,
)
from llava_triton.serving.metrics import engine_metrics, image_encoder_metrics

DOCS = Path(__file__).resolve().parents[2] / "docs"
TRITONS = {"nv_gpu_utilization", "nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes"}
"""Triton's own, which it publishes where there is a GPU."""
PROMETHEUS = {"job", "instance", "le"}


def published() -> dict[str, dict[str, set[str]]]:
    """The values of each label of each metric, by its name."""
    pictures: Any = SimpleNamespace(hits=1, misses=1)
    journal: Any = SimpleNamespace(written=1, dropped=1)
    now = Statistics()
    now.journal = JournalCounters()
    samples = [*engine_metrics(now), *image_encoder_metrics(pictures, journal)]
    page = "".join(
        f"# HELP {sample.name} x\n{sample.name}"
        + ("{" + ",".join(f'{k}="{v}"' for k, v in sample.labels.items()) + "}")
        + " 1\n"
        for sample in samples
    )
    engines: Any = SimpleNamespace(all=[SimpleNamespace(number=0, serves=True)], resumed=0)
    adapter = AdapterMetrics(engines)
    for outcome in ("ok", "internal"):
        adapter.ended("chat", outcome)
    found: dict[str, dict[str, set[str]]] = {name: {} for name in TRITONS}
    for line in (joined([page]) + adapter.text()).splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"(\w+)(?:\{(.*)\})? \S+", line)
        assert match is not None, line
        labels = found.setdefault(match[1], {})
        for label, value in re.findall(r'(\w+)="([^"]*)"', match[2] or ""):
            labels.setdefault(label, set()).add(value)
    return found


def dashboard_queries() -> Iterator[tuple[str, str]]:
    dashboard = json.loads((DOCS / "operations" / "dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["definition"]


def alert_queries() -> Iterator[tuple[str, str]]:
    rules = yaml.safe_load((DOCS / "operations" / "alerts.yml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


QUERIES = [*dashboard_queries(), *alert_queries()]


def check(query: str) -> set[str]:
    """The metrics of a query.

    Raises:
        AssertionError: one, or a label or its value, is not published.
    """
    known = published()
    names = set(re.findall(r"\b(?:llava|nv)_\w+", query))
    assert names
    for name in names:
        assert name in known, f"{name} is published by nobody"
    for name, matchers in re.findall(r"\b((?:llava|nv)_\w+)\{(.*?)\}", query):
        for label, value in re.findall(r'(\w+)="([^"]*)"', matchers):
            assert value in known[name].get(label, set()), f"{name} has no {label}={value}"
    labels = {label for name in names for label in known[name]} | PROMETHEUS | {"gpu_uuid"}
    for grouped in re.findall(r"\bby \((.*?)\)", query):
        for label in grouped.split(", "):
            assert label in labels, f"{names} have no label {label}"
    assert query.count("(") == query.count(")")
    return names


@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_queries_ask_for_what_is_published(title: str, query: str) -> None:
    check(query)


@pytest.mark.parametrize(
    "query",
    [
        "sum(llava_session)",
        'rate(llava_turns_total{outcome="lost"}[5m])',
        "sum by (tenant) (llava_sessions)",
    ],
)
def test_a_query_for_something_else_would_be_seen(query: str) -> None:
    with pytest.raises(AssertionError, match=r"published by nobody|has no|have no"):
        check(query)


def test_the_dashboard_shows_every_metric() -> None:
    shown = set().union(*(check(query) for _, query in dashboard_queries()))
    histograms = {
        name
        for name in published()
        if name.removesuffix("_sum").removesuffix("_count") + "_bucket" in shown
    }
    assert set(published()) - histograms == shown - histograms


def test_operations_tells_what_each_metric_and_alert_means() -> None:
    text = (DOCS / "operations.md").read_text()
    for name in published():
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        assert f"`{base}" in text, base
    for alert, _ in alert_queries():
        assert f"`{alert}`" in text, alert


def test_panels_have_their_own_places() -> None:
    dashboard = json.loads((DOCS / "operations" / "dashboard.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = cast("dict[str, int]", panel["gridPos"])
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


SHAPES = {  # bytes of keys and values a token, of features a token; tokens of a picture; context
    "llava-1.5-7b": (512 * 1024, 8 * 1024, 576, 4096),
    "llava-1.5-13b": (800 * 1024, 10 * 1024, 576, 4096),
    "llava-v1.6-mistral-7b": (128 * 1024, 8 * 1024, 2340, 32768),
    "llava-onevision-qwen2-7b-ov": (56 * 1024, 7 * 1024, 4725, 32768),
}
"""As docs/families.md has them."""
TOWERS = {"llava-onevision-qwen2-7b-ov": 400_000_000}
"""Parameters of the vision tower, where it is not CLIP-L/14's."""
VOCABULARIES = {"llava-onevision-qwen2-7b-ov": 152_000}
"""Tokens, where it is not Llama's vocabulary."""
TALK = 1000


def sessions_on(gpu_bytes: float, billions: float, name: str) -> int | None:
    """How many sessions the server would plan for; None where it would not start."""
    token, feature, picture, context = SHAPES[name]
    settings, gpu = Settings(), torch.device("cuda")
    tower = TOWERS.get(name, 300_000_000)
    needs = GpuNeeds.of(tower, settings.max_sessions, VOCABULARIES.get(name, 32_064))
    weights = int(2 * (billions * 1e9 - tower))
    free = int(gpu_bytes) - weights - CONTEXT_BYTES
    budget = gpu_budget(free, int(gpu_bytes), weights, needs)
    features = features_budget(settings, picture * feature, budget, gpu)
    blocks = blocks_for(settings, token * BLOCK_TOKENS, context, budget, features, gpu)
    try:
        check_blocks(blocks, picture, settings, gpu)
    except ValueError:
        return None
    return blocks // (-(-(picture + TALK) // BLOCK_TOKENS) + 1)


def test_the_table_of_sessions_is_what_the_server_would_plan() -> None:
    text = (DOCS / "operations.md").read_text()
    rows = re.findall(r"^\| (\S+) \| (\S+) x 10\^9 \| (\S+) \| (.*) \|$", text, re.MULTILINE)
    assert [row[0] for row in rows] == list(SHAPES)
    for name, billions, tokens, cells in rows:
        assert int(tokens.replace(",", "")) == SHAPES[name][2] + TALK
        told = [None if cell == "-" else int(cell) for cell in cells.split(" | ")]
        planned = [sessions_on(gb * 1e9, float(billions), name) for gb in (24, 48, 80)]
        assert told == planned, name


def record_bytes(picture: int) -> int:
    """Of a record with 50 tokens asked and 100 answered, four letters each."""
    end = picture + 150
    turn = CompletedTurn(end - 100, end, images=1, pending=0, answer="x" * 400, number=0)
    name, now = "0" * 64, 1.7e9 + 0.123456
    return len(
        encode(
            Record(
                session=name,
                tenant="",
                generation="0" * 32,
                writer="0" * 32,
                checkpoint=name,
                opened_at=now,
                written_at=now,
                expires_at=now,
                kept=3,
                tokens=[29871] * end,
                spans=[Span(5, picture)] if picture else [],
                turns=[turn],
                images=[name] if picture else [],
                pending=0,
                text="x" * 200,
                finish_reason="stop",
            ),
            1,
            name,
        )
    )


def test_the_bytes_of_the_journal_are_those_of_its_records() -> None:
    text = (DOCS / "operations.md").read_text()
    first = re.search(r"first record.*?\| (.*) \|$", text, re.MULTILINE)
    others = re.search(r"each of the 9 others \| (.*) \|$", text, re.MULTILINE)
    together = re.search(r"\| together \| (.*) \|$", text, re.MULTILINE)
    assert first is not None
    assert others is not None
    assert together is not None
    for told, later, all_told, picture in zip(
        first[1].split(" | "),
        others[1].split(" | "),
        together[1].split(" | "),
        (576, 2340, 4725),
        strict=True,
    ):
        assert f"{record_bytes(picture) / 1000:.1f} kB" == told
        assert f"{record_bytes(0) / 1000:.1f} kB" == later
        session = record_bytes(picture) + 9 * record_bytes(0) + 200_000
        assert f"{session / 1000:.0f} kB" == all_told
