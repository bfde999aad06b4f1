"""`llava-triton check`: whether this machine can serve, and what to do where it cannot."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llava_triton.server.installation import find_installation
from llava_triton.server.ports import PortError, check_ports
from llava_triton.server.server_error import ServerError

PYTHONS = ((3, 11), (3, 12))
GIB = 1024**3
MIB = 1024**2
MEMORY = 4 * GIB
"""Less does not hold torch, Triton's processes and any model."""
SHARED_MEMORY = 128 * MIB
"""What passes between the models of a LLaVA-1.5 when four pictures come at once: see
`llava_sagemaker.container.shared_memory`, which asks the repository itself."""
DISK = 2 * GIB
PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002, "openai": 8080}
DRIVER = "libcuda.so.1"
LIBRARIES = {DRIVER: "the GPU's driver"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    found: str
    advice: str = ""
    """What to do; empty where all is well."""
    is_needed: bool = True
    """Whether nothing can be served as long as the advice is not followed."""


def look(host: str = "127.0.0.1") -> bool:
    """Look at everything, and print a table of what was found.

    Args:
        host: the address that the ports are to be opened at.

    Returns:
        Whether the machine can serve.
    """
    console = Console()
    with console.status("looking at this machine"):
        found = list(findings(host))
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for each in found:
        mark = (
            "[green]ok[/]"
            if not each.advice
            else "[red]no[/]"
            if each.is_needed
            else "[yellow]?[/]"
        )
        table.add_row(mark, each.what, escape(each.found))
    console.print(table)
    for each in found:
        if each.advice:
            console.print(f"[bold]{each.what}[/]: {escape(each.advice)}", highlight=False)
    return not any(each.advice and each.is_needed for each in found)


def findings(host: str) -> Iterator[Finding]:
    """All there is to look at, one after the other."""
    parts: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _packages,
        _triton,
        _gpu,
        _compiler,
        _memory,
        _places,
        lambda: _ports(host),
    ]
    for part in parts:
        yield from part()


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    served = sys.version_info[:2] in PYTHONS
    names = " or ".join(".".join(map(str, each)) for each in PYTHONS)
    advice = "" if served else f"make the virtual environment with Python {names}"
    yield Finding("Python", f"{version} ({sys.executable})", advice)


def _packages() -> Iterator[Finding]:
    """Those that serving needs, in the versions that the project is written for."""
    wrong = []
    for line in importlib.metadata.requires("llava-triton") or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": "server"}):
            continue
        if requirement.name == "llava-triton":
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version} instead of {requirement.specifier}")
    advice = f"{'; '.join(wrong)}: pip install 'llava-triton[server]'" if wrong else ""
    yield Finding("packages", "as needed" if not wrong else f"{len(wrong)} do not fit", advice)
    numpy = importlib.metadata.version("numpy")
    old = numpy.startswith("1.")
    yield Finding(
        "NumPy",
        numpy,
        "" if old else "Triton 2.51 from PyPI crashes with NumPy 2: pip install 'numpy<2'",
    )


def _triton() -> Iterator[Finding]:
    try:
        installation = find_installation()
    except ServerError as error:
        yield Finding("Triton", "none", str(error))
        return
    with tempfile.TemporaryDirectory() as folder:
        environment = installation.environment(Path(folder))
        try:
            done = subprocess.run(
                [str(installation.binary), "--help"],
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=60.0,
                check=False,
            )
            words = done.stderr
        except (OSError, subprocess.TimeoutExpired) as error:
            words = str(error)
    missing = re.findall(r"(\S+): cannot open shared object file", words)
    if missing:
        advice = f"it lacks the library {missing[0]}; install the Debian package that has it"
    else:
        advice = (
            "" if "Usage" in words + done.stdout else f"it does not start: {words.strip()[-300:]}"
        )
    yield Finding("Triton", str(installation.binary), advice)


def _gpu() -> Iterator[Finding]:
    import torch

    version = f"torch {torch.__version__}"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        free, total = torch.cuda.mem_get_info(0)
        yield Finding("GPU", f"{name}, {free / GIB:.0f} of {total / GIB:.0f} GiB free; {version}")
    elif not any(Path("/dev").glob("nvidia[0-9]*")):
        yield Finding("GPU", f"none: answers are computed on {os.cpu_count()} cores; {version}")
    else:
        advice = "torch cannot use the GPU of this machine; " + (
            "install torch for CUDA (PyPI's, without an index of CPU wheels)"
            if torch.version.cuda is None
            else f"install a driver for CUDA {torch.version.cuda} or newer (nvidia-smi tells it)"
        )
        yield Finding("GPU", version, advice, is_needed=False)


def _compiler() -> Iterator[Finding]:
    named = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    found = next((path for name in named if (path := shutil.which(name))), None)
    advice = "" if found else "the kernels are compiled where they run: apt-get install g++"
    yield Finding("compiler", found or "none", advice)


def _memory() -> Iterator[Finding]:
    from llava_triton.model.memory_size import host_memory

    free = host_memory()
    small = f"a model needs its weights and {MEMORY // GIB} GiB beside them; end other programs"
    yield Finding("memory", f"{free / GIB:.1f} GiB free", "" if free >= MEMORY else small, False)
    shared = shutil.disk_usage("/dev/shm").free
    wanted = (
        f"pictures that come at the same time may be refused: give it {SHARED_MEMORY // MIB} MiB"
    )
    yield Finding(
        "/dev/shm",
        f"{shared // MIB} MiB free",
        "" if shared >= SHARED_MEMORY else f"{wanted} (docker run --shm-size=1g)",
        False,
    )


def _places() -> Iterator[Finding]:
    """Folders for compiled kernels, exported models and what Triton needs while it runs."""
    from llava_cli.files import repositories

    folder = repositories()
    exists = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(exists).free
    advice = ""
    if not os.access(exists, os.W_OK):
        advice = f"{exists} is not writable; set XDG_CACHE_HOME to a folder that is"
    elif free < DISK:
        advice = f"exported models and compiled kernels need room: free {DISK // GIB} GiB there"
    yield Finding("cache", f"{folder}, {free / GIB:.0f} GiB free", advice)


def _ports(host: str) -> Iterator[Finding]:
    for service, port in PORTS.items():
        try:
            check_ports(host, {service: port})
        except PortError as error:
            option = "--port" if service == "openai" else f"--{service}-port"
            advice = f"{str(error).partition(';')[0]}; serve with {option} and another"
            yield Finding(f"port {port}", "taken", advice, is_needed=False)
        else:
            yield Finding(f"port {port}", "free")
