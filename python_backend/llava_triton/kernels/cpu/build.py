"""Compiles the CPU kernels for the CPU at hand, once: the result is kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

# Binds libgomp.so.1, which ships with torch: loaded first, it is the one the kernels find too,
# and both share one pool of threads.
import torch  # noqa: F401

from llava_triton.private_folder import is_private

_FOLDER = Path(__file__).parent
SOURCES = tuple(
    _FOLDER / f"{name}.cpp" for name in ("attention", "products", "int4_products", "layers")
)
_HEADERS = tuple(_FOLDER / f"{name}.h" for name in ("vectors", "panels", "tiles", "sharing"))
# No -ffast-math: masks rely on infinities. What is given up here is errno and traps alone.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"),
    "-Wno-ignored-attributes",
)
_COMPILERS = ("c++", "g++", "clang++")
_COMPILE_SECONDS = 300.0


class KernelBuildError(RuntimeError):
    """The CPU kernels cannot be compiled here; the text says what to install."""


def load_kernels() -> ctypes.CDLL:
    """The compiled kernels; compiles them (some seconds) where no build of them is cached.

    Raises:
        KernelBuildError: no C++ compiler was found, or it failed.
    """
    compiler = _find_compiler()
    name = f"cpu_kernels-{_fingerprint(compiler)}.so"
    for directory in _cache_directories():
        library = directory / name
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not is_private(directory):
                continue  # what lies there may be anybody's program
            if not library.exists():
                _compile(compiler, library)
            return ctypes.CDLL(str(library))
        except OSError:
            continue  # not writable, or mounted so that nothing may be run from it
    raise KernelBuildError(
        "the CPU kernels were not built: no directory to keep them in is writable, by you alone, "
        f"and allows running programs; tried {', '.join(map(str, _cache_directories()))}. "
        "Set XDG_CACHE_HOME to one that does"
    )


def _find_compiler() -> list[str]:
    """The command that starts a C++ compiler: $CXX if set, else the first one on the path."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in _COMPILERS]:
        if shutil.which(command[0]):
            return command
    looked_for = f"$CXX ({named[0]})" if named else ", ".join(_COMPILERS)
    raise KernelBuildError(
        "answering on a CPU needs a C++ compiler, and none was found (looked for "
        f"{looked_for}). Install one, for example with: apt-get install g++"
    )


def _fingerprint(compiler: list[str]) -> str:
    """Names a build by all it depends on: a home may be shared by machines that differ."""
    code = [path.read_text() for path in (*SOURCES, *_HEADERS)]
    parts = [*code, *FLAGS, *compiler, _run([*compiler, "--version"]), _cpu()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _cpu() -> str:
    """What -march=native looks at: model and features of the first processor."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    telling = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU ")
    return "\n".join(line for line in first.splitlines() if line.startswith(telling))


def _cache_directories() -> list[Path]:
    """Where builds are kept, the best place first."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # A name of its own for every user: nobody should load what another one could have put there.
    return [
        Path(home) / "llava-triton",
        Path(tempfile.gettempdir()) / f"llava-triton-{os.getuid()}",
    ]


def _compile(compiler: list[str], library: Path) -> None:
    """Compile to `library`, which appears whole or not at all to processes beside this one."""
    handle, unfinished = tempfile.mkstemp(dir=library.parent, suffix=".so")
    os.close(handle)
    try:
        _run([*compiler, *FLAGS, "-o", unfinished, *map(str, SOURCES)])
        os.replace(unfinished, library)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelBuildError(
            f"the CPU kernels were not built: {shlex.join(command)}: {error}. "
            "Install a working compiler, for example with: apt-get install g++"
        ) from error
    if done.returncode != 0:
        raise KernelBuildError(
            f"the CPU kernels were not built: {shlex.join(command)} ended with code "
            f"{done.returncode}: {done.stderr.strip()[-2000:]}\nIs the compiler complete and does "
            "it know C++17 and OpenMP? On Debian: apt-get install g++"
        )
    return done.stdout
