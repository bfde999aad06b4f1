"""The Pythons that the stages of `make gpu-check` run in: this one, with what was brought along."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

from benchmarks.findings import ROOT
from benchmarks.gpu_check.wheels import SERVER_ONLY

SOURCES = (ROOT, ROOT / "python_backend", ROOT / "export")
HIDDEN = ("scipy", "sklearn", "skimage", "pandas", "pyarrow", "numba", "cv2", "h5py", "jax")
"""From the server's Python: they may want a newer NumPy than it has, and transformers, which
imports what it finds, is as good without."""

NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
"""In the environment of a process that shall not see the GPU. Its kernels for one, if it launches
any, run in the Triton language's interpreter, which is chosen before anything imports it."""


class WheelsError(RuntimeError):
    """The wheels that were brought along cannot be used; the text says why."""


class Pythons:
    """Two environments in a folder, each with what the running Python has.

    Environments rather than PYTHONPATH, because the Python backend of Triton's wheel heeds only
    the environment that `python3` belongs to.

    Args:
        folder: for the environments.
        wheels: folder of what was brought along; may be missing or empty.

    Raises:
        WheelsError: a wheel cannot be installed.
    """

    def __init__(self, folder: Path, wheels: Path) -> None:
        files = sorted(wheels.glob("*.whl")) if wheels.is_dir() else []
        names = tuple(name.replace("-", "_") for name in SERVER_ONLY)
        for_server = [file for file in files if file.name.split("-")[0].lower() in names]
        for_all = [file for file in files if file not in for_server]
        self.wheels = len(files)
        everywhere, server_only = folder / "wheels", folder / "wheels-of-the-server"
        install(for_all, everywhere)
        install(for_server, server_only)
        self.plain = make_environment(folder / "plain", [*SOURCES, everywhere])
        """For everything but Triton."""
        self.server = make_environment(
            folder / "server", [server_only, *SOURCES, everywhere], HIDDEN if for_server else ()
        )
        """For Triton and what talks to it."""


def install(wheels: Sequence[Path], target: Path) -> None:
    """Unpack wheels into a folder, with nothing that they need."""
    if not wheels:
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--no-compile", "--no-cache-dir", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--target", str(target), *map(str, wheels)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise WheelsError(f"the wheels in {wheels[0].parent} cannot be installed:\n{done.stderr}")


def make_environment(folder: Path, first: Sequence[Path], hidden: Sequence[str] = ()) -> Path:
    """A virtual environment.

    Args:
        folder: to be made.
        first: folders to be searched for modules before what the running Python has.
        hidden: modules that shall not be found.

    Returns:
        Its interpreter.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    inherited = dict.fromkeys(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))
    lines = [str(path) for path in first]
    if hidden:
        lines.append(f"import sys; sys.modules.update(dict.fromkeys({tuple(hidden)!r}))")
    # Not as plain lines: what is installed there in place has lines of its own.
    lines += [f"import site; site.addsitedir({path!r})" for path in inherited]
    packages = sysconfig.get_path("purelib", "venv", {"base": str(folder)})
    (Path(packages) / "gpu-check.pth").write_text("\n".join(lines) + "\n")
    return folder / "bin" / "python3"
