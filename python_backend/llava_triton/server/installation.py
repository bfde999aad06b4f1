"""Where a Triton server is found, and how it is started from there."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from llava_triton.server.large_blocks import LARGE_BLOCK_BYTES
from llava_triton.server.server_error import ServerError


class InstallationError(ServerError):
    """No usable Triton server on this machine; the sentence says what to install."""


CPU_ENVIRONMENT = {"GOMP_SPINCOUNT": "2000", "THP_MEM_ALLOC_ENABLE": "1"}
"""How torch uses CPUs and their memory.

Its threads wait for each other spinning for some tens of microseconds, then asleep. Spinning
without such a bound (the default), two that the kernel has put on one core wait a whole time slice
at every layer: 480 ms instead of 5 ms to the first token on two cores. Asleep at once, the products
of a decode step (12 layers of 768) cost 24 instead of 16 ms there: waking takes long.

Large tensors lie in large pages: a tenth to a quarter less time for the same products.
"""

MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(LARGE_BLOCK_BYTES)}
"""How Triton's processes keep memory: see `large_blocks`."""


@dataclass(frozen=True)
class Installation:
    """A Triton server on disk."""

    binary: Path
    backends: Path
    """The directory of backends that came with it."""
    stub: Path | None
    """The Python backend's stub for the running Python, where it is not with its backend."""
    libraries: tuple[Path, ...] = ()
    """Directories the dynamic loader must search."""

    def backend_directory(self, run_folder: Path) -> Path:
        """The directory for `--backend-directory`.

        The wheel keeps stubs for many Pythons apart from the backend; ours is put beside a copy
        of the backend in the run folder.
        """
        if self.stub is None:
            return self.backends
        python_backend = run_folder / "backends" / "python"
        shutil.copytree(self.backends / "python", python_backend)
        shutil.copy2(self.stub, python_backend / "triton_python_backend_stub")
        return python_backend.parent

    def environment(self, run_folder: Path) -> dict[str, str]:
        """The environment under which the models find this Python and its packages.

        Args:
            run_folder: for what must be made for it.

        The wheel's stub ignores PYTHONPATH: it takes the virtual environment that the first
        `python3` on PATH belongs to. Other releases' stubs go by PYTHONPATH.
        """
        paths = sysconfig.get_paths()
        packages = [str(Path(__file__).resolve().parents[2]), paths["purelib"], paths["platlib"]]
        environment = dict(os.environ)
        _put_first(environment, "PATH", [str(Path(sys.executable).parent)])
        _put_first(environment, "PYTHONPATH", packages)
        libraries = [*self.libraries, *_cuda_driver(run_folder)]
        _put_first(environment, "LD_LIBRARY_PATH", [str(path) for path in libraries])
        # What a model prints belongs in the log at once, not when its buffer is full.
        environment["PYTHONUNBUFFERED"] = "1"
        for name, value in (CPU_ENVIRONMENT | MEMORY_ENVIRONMENT).items():
            environment.setdefault(name, value)
        return environment


def _cuda_driver(run_folder: Path) -> list[Path]:
    """The directory of a link that the machine lacks: Triton's Python backend looks for the driver
    as `libcuda.so`, which only development packages install, and calls it even without."""
    if _loads("libcuda.so") or not _loads("libcuda.so.1"):
        return []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/libcuda.so" in line:
            folder = run_folder / "lib"
            folder.mkdir()
            (folder / "libcuda.so").symlink_to(line[line.index("/") :])
            return [folder]
    return []


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def find_installation() -> Installation:
    """The machine's own Triton (NVIDIA's container has one), else the wheel's.

    Raises:
        InstallationError: neither is there, or the wheel does not support this Python.
    """
    for candidate in (shutil.which("tritonserver"), "/opt/tritonserver/bin/tritonserver"):
        if candidate and os.access(candidate, os.X_OK):
            binary = Path(candidate).resolve()
            backends = binary.parents[2] / "backends"
            if (backends / "python").is_dir():
                return Installation(binary=binary, backends=backends, stub=None)
    return _wheel_installation()


def _wheel_installation() -> Installation:
    specification = importlib.util.find_spec("pytriton")
    if specification is None or not specification.submodule_search_locations:
        raise InstallationError(
            "no Triton server found: neither `tritonserver` on PATH nor the wheel that carries "
            'one; install it with `pip install "llava-triton[server]"`'
        )
    package = Path(specification.submodule_search_locations[0])
    root = package / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        supported = ", ".join(sorted(path.name for path in stub.parents[2].glob("3.*")))
        raise InstallationError(
            f"the Triton server in {package} has no stub for Python {version} (it supports "
            f"{supported}); make the virtual environment with one of those"
        )
    library_directory = sysconfig.get_config_var("LIBDIR")
    return Installation(
        binary=root / "bin" / "tritonserver",
        backends=root / "backends",
        stub=stub,
        libraries=(package.parent / "nvidia_pytriton.libs", Path(library_directory)),
    )


def _put_first(environment: dict[str, str], name: str, values: list[str]) -> None:
    inherited = [environment[name]] if environment.get(name) else []
    joined = os.pathsep.join(dict.fromkeys(values + inherited))
    if joined:
        environment[name] = joined
