"""`make gpu-wheels`: what a GPU machine without a network lacks, as wheels to be brought along.

The machine has torch, transformers, pytest and their like. What is fetched here is Triton's
server, its client, and NumPy 1: the server's Python backend was compiled for it and crashes with
NumPy 2, so it gets one of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from benchmarks.findings import ROOT

PYTHON = "3.12"
"""Of the GPU machine."""
NEEDED = (
    "nvidia-pytriton",  # for its server alone: what its Python API needs is left out
    "tritonclient",
    "python-rapidjson",
    # There already in some version; but tritonclient refuses those that are too old.
    "grpcio",
    "protobuf",
    # tritonclient over HTTP, for the tests.
    "geventhttpclient",
    "gevent",
    "greenlet",
    "zope.event",
    "zope.interface",
    "brotli",
    "numpy",
    "ml_dtypes",  # there, but maybe one for NumPy 2 alone
)
SERVER_ONLY = ("numpy", "ml_dtypes")
"""Go into the server's Python alone."""
GLIBC_MINORS = (5, 12, 17, 24, 26, 27, 28, 31, 34, 35, 39)
"""pip wants every one that is allowed named."""
_OTHER_PYTHONS = ("3.8", "3.9", "3.10", "3.11", "3.13")


def platforms() -> list[str]:
    """pip's names of x86-64 Linux up to glibc 2.39."""
    numbered = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC_MINORS]
    return [*numbered, "manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"]


def pinned(constraints: Path) -> dict[str, str]:
    """`name==version` of everything that is needed, by name.

    Raises:
        SystemExit: the constraints have no version of something.
    """
    lines = constraints.read_text().splitlines()
    by_name = {line.partition("==")[0].lower(): line for line in lines if "==" in line}
    missing = [name for name in NEEDED if name not in by_name]
    if missing:
        raise SystemExit(f"error: {constraints} has no version of {', '.join(missing)}")
    return {name: by_name[name] for name in NEEDED}


def download(target: Path) -> None:
    """Fetch the wheels with pip."""
    chosen = [part for name in platforms() for part in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON]
    command += [*chosen, "--dest", str(target)]
    subprocess.run([*command, *pinned(ROOT / "constraints.txt").values()], check=True)


def is_left_out(name: str) -> bool:
    """Whether a file of a wheel serves nothing here: other Pythons' parts of the server, tests."""
    if name.startswith("pytriton/tritonserver/python_backend_stubs/"):
        return name.split("/")[3] in _OTHER_PYTHONS
    return name.startswith("nvidia_pytriton.libs/libpython3") or (
        name.startswith("numpy/") and "/tests/" in name
    )


def shrink(wheel: Path, target: Path) -> None:
    """Write a wheel anew without what serves nothing here, and packed more tightly."""
    with (
        zipfile.ZipFile(wheel) as given,
        zipfile.ZipFile(target, "w", zipfile.ZIP_LZMA) as smaller,
    ):
        for entry in given.infolist():
            if is_left_out(entry.filename):
                continue
            content = given.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                kept = (row for row in content.splitlines(True) if not is_left_out(row.decode()))
                content = b"".join(kept)
            entry.compress_type = zipfile.ZIP_LZMA
            smaller.writestr(entry, content)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-wheels")
    options = parser.parse_args()
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    for old in output.glob("*.whl"):
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="gpu-wheels-") as folder:
        download(Path(folder))
        for wheel in sorted(Path(folder).glob("*.whl")):
            shrink(wheel, output / wheel.name)
            before, after = (path.stat().st_size for path in (wheel, output / wheel.name))
            print(f"{before / 1e6:7.1f} -> {after / 1e6:5.1f} MB  {wheel.name}")
    total = sum(wheel.stat().st_size for wheel in output.glob("*.whl"))
    print(f"{total / (1 << 20):.1f} MiB in {output}; bring this folder along with the checkout")
    return 0


if __name__ == "__main__":
    sys.exit(main())
