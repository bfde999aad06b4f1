"""What the server does with names in folders where everybody may write: other users make theirs."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llava_triton.kernels.cpu import build as cpu_build
from llava_triton.server import server_guard
from llava_triton.server.run_folder import remove_stale

SERVER = f"{server_guard.PREFIX}a1b2c3d4"
NOBODY = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what is another user's")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Like /tmp."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Starts what looks like the process of a model of the server with this name."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(server: str) -> subprocess.Popen[bytes]:
        stub = tmp_path / "triton_python_backend_stub"
        if not stub.exists():
            stub.symlink_to(sys.executable)
        model = tmp_path / "toy" / "1" / "model.py"
        model.parent.mkdir(parents=True, exist_ok=True)
        model.write_text("print(flush=True); input()")
        process = subprocess.Popen(
            [stub, model, f"{server}-region"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def region() -> Iterator[Callable[[str], Path]]:
    """Makes an entry of /dev/shm with a name."""
    made: list[Path] = []

    def make(name: str) -> Path:
        made.append(Path("/dev/shm") / name)
        made[-1].touch()
        return made[-1]

    yield make
    for path in made:
        path.unlink(missing_ok=True)


def stale(folder: Path) -> Path:
    """A run folder as a killed guard leaves it."""
    folder.mkdir(mode=0o700)
    (folder / server_guard.LOCK).touch(mode=0o600)
    return folder


def test_what_a_killed_guard_left_is_removed(
    place: Path,
    start: Callable[[str], subprocess.Popen[bytes]],
    region: Callable[[str], Path],
) -> None:
    folder, process, shared = stale(place / SERVER), start(SERVER), region(f"{SERVER}-region")
    assert server_guard.stubs(SERVER) == {process.pid: "toy"}
    remove_stale(place)
    assert process.wait(10.0) < 0
    assert not folder.exists()
    assert not shared.exists()


def test_what_a_living_guard_holds_is_left(place: Path) -> None:
    folder = stale(place / SERVER)
    with (folder / server_guard.LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_stale(place)
        assert folder.exists()


def link_to_anothers_folder(place: Path) -> None:
    """The link's name is ours; the folder is anybody's, with a link to a file of ours in it."""
    other = place / "other"
    other.mkdir(mode=0o755)
    (place / "ours").touch()
    (other / server_guard.LOCK).symlink_to(place / "ours")
    os.chown(other, NOBODY, NOBODY)
    (place / SERVER).symlink_to(other)


def anothers_folder(place: Path) -> None:
    os.chown(stale(place / SERVER), NOBODY, NOBODY)


def folder_that_others_can_write(place: Path) -> None:
    stale(place / SERVER).chmod(0o777)


def link_for_a_lock(place: Path) -> None:
    folder = place / SERVER
    folder.mkdir(mode=0o700)
    (place / "ours").touch()
    (folder / server_guard.LOCK).symlink_to(place / "ours")


def anothers_lock(place: Path) -> None:
    os.chown(stale(place / SERVER) / server_guard.LOCK, NOBODY, NOBODY)


def pipe_for_a_lock(place: Path) -> None:
    folder = place / SERVER
    folder.mkdir(mode=0o700)
    os.mkfifo(folder / server_guard.LOCK)


def name_that_ours_begins_with(place: Path) -> None:
    stale(place / SERVER[:-1])


@as_root
@pytest.mark.parametrize(
    "lure",
    [
        link_to_anothers_folder,
        anothers_folder,
        folder_that_others_can_write,
        link_for_a_lock,
        anothers_lock,
        pipe_for_a_lock,
        name_that_ours_begins_with,
    ],
    ids=lambda each: each.__name__,
)
def test_nobody_elses_folder_makes_us_kill_a_server(
    place: Path,
    start: Callable[[str], subprocess.Popen[bytes]],
    region: Callable[[str], Path],
    lure: Callable[[Path], None],
) -> None:
    running, shared = start(SERVER), region(f"{SERVER}-region")
    lure(place)
    before = sorted(place.rglob("*"))
    remove_stale(place)
    assert running.poll() is None
    assert shared.exists()
    assert sorted(place.rglob("*")) == before


@as_root
def test_what_others_put_into_shared_memory_is_theirs(
    place: Path, region: Callable[[str], Path]
) -> None:
    """It is neither removed nor opened to anybody, and does not keep us from cleaning up."""
    folder = stale(place / SERVER)
    theirs = region(f"{SERVER}-theirs")
    os.chown(theirs, NOBODY, NOBODY)
    ours = region(f"{SERVER}-ours")
    link = Path("/dev/shm") / f"{SERVER}-link"
    directory = Path("/dev/shm") / f"{SERVER}-directory"
    link.symlink_to(theirs)
    directory.mkdir()
    try:
        assert server_guard.shared_memory(SERVER) == [ours]
        remove_stale(place)
        assert not folder.exists()
        assert not ours.exists()
        assert theirs.exists()
    finally:
        link.unlink()
        directory.rmdir()


@as_root
@pytest.mark.parametrize("owner", [NOBODY, 0], ids=["anothers", "open to others"])
def test_kernels_are_not_loaded_from_a_folder_that_others_can_write(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: int
) -> None:
    """/tmp/llava-triton-UID can be made by anybody before us; its file would run as ours."""
    monkeypatch.setattr("tempfile.tempdir", str(place))
    (tmp_path / "no folder").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no folder"))
    folder = place / f"llava-triton-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    os.chown(folder, owner, owner)
    with pytest.raises(cpu_build.KernelBuildError, match="writable, by you alone"):
        cpu_build.load_kernels()
