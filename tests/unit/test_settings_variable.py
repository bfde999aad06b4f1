"""Settings that the environment changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_triton.contract.settings import FILE_NAME, VARIABLE, Settings


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / FILE_NAME).write_text(Settings(max_sessions=10, weights="int8").to_json())
    return tmp_path


def test_what_it_does_not_say_is_the_repositorys(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert Settings.of_repository(repository) == Settings(max_sessions=10, weights="int8")
    monkeypatch.setenv(VARIABLE, json.dumps({"max_sessions": 20, "journal": "file:///j"}))
    assert Settings.of_repository(repository) == Settings(
        max_sessions=20, weights="int8", journal="file:///j"
    )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("{", "is not JSON"),
        ("[1]", "must be an object"),
        ('{"max_session": 1}', "unknown settings: max_session"),
        ('{"max_sessions": 0}', "a number above 0"),
        ('{"vision_max_batch": 2}', "Export the repository again"),
        ('{"session_lifetime_seconds": 1e9}', "a longer session_lifetime_seconds"),
        ('{"max_sessions": 2000}', "max_sessions above 1250"),
    ],
)
def test_what_cannot_be_is_told(
    repository: Path, monkeypatch: pytest.MonkeyPatch, given: str, told: str
) -> None:
    monkeypatch.setenv(VARIABLE, given)
    with pytest.raises(ValueError, match=told):
        Settings.of_repository(repository)


def test_shorter_lives_need_no_export(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, '{"session_lifetime_seconds": 60, "session_idle_seconds": 5}')
    assert Settings.of_repository(repository).session_idle_seconds == 5
