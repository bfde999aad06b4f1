"""An adapter with a stub in Triton's place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_triton.contract.settings import Settings
from tests.adapter_process import Adapter
from tests.stub_triton import StubTriton

SETTINGS = Settings(max_sessions=4, max_queued_turns=4)


@pytest.fixture(scope="module")
def settings_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter reads nothing of a repository but its settings."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "settings.json").write_text(SETTINGS.to_json())
    return folder


@pytest.fixture(scope="module")
def stub_triton() -> Iterator[StubTriton]:
    """Knows sessions and echoes."""
    stub = StubTriton()
    yield stub
    stub.stop()


@pytest.fixture(scope="module")
def stub_adapter(stub_triton: StubTriton, settings_repository: Path) -> Iterator[Adapter]:
    """An adapter in front of `stub_triton`."""
    adapter = Adapter(stub_triton, settings_repository)  # type: ignore[arg-type]
    try:
        adapter.wait_until(lambda: adapter.ping() == 200)
        yield adapter
    finally:
        adapter.stop()
