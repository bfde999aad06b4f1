"""Which part of the code may know which: no circle, no arrow upward."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = {
    "llava_triton": ROOT / "python_backend" / "llava_triton",
    "llava_export": ROOT / "export" / "llava_export",
    "llava_sagemaker": ROOT / "sagemaker" / "llava_sagemaker",
    "demo": ROOT / "demo",
    "benchmarks": ROOT / "benchmarks",
    "llava_cli": ROOT / "cli" / "llava_cli",
}
MAY_KNOW = {
    "llava_triton": set(),
    "llava_export": {"llava_triton"},
    "llava_sagemaker": {"llava_triton", "llava_export"},
    "demo": {"llava_triton", "llava_export"},
    "benchmarks": {"llava_triton", "llava_export", "llava_sagemaker", "demo"},
    "llava_cli": {"llava_triton", "llava_export", "llava_sagemaker"},
}
ROOMS = {
    "contract": set(),
    "device": set(),
    "private_folder": set(),
    "checkpoint": set(),
    "server": {"private_folder", "contract"},
    "client": {"contract"},
    "conversation": {"contract"},
    "pictures": {"contract", "checkpoint", "device"},
    "journal": {"contract", "conversation"},
    "kernels": {"private_folder"},
    "model": {"contract", "checkpoint", "device", "kernels"},
    "engine": {"contract", "conversation", "device", "journal", "kernels", "model"},
    "serving": {"contract", "checkpoint", "device", "pictures", "journal", "model", "engine"},
}
"""Those of llava_triton, and which others each may know."""


def modules(package: str) -> Iterator[tuple[str, Path]]:
    folder = PACKAGES[package]
    for path in folder.rglob("*.py"):
        name = ".".join((package, *path.relative_to(folder).with_suffix("").parts))
        yield name.removesuffix(".__init__"), path


MODULES = {name: path for package in PACKAGES for name, path in modules(package)}


def imports(name: str) -> set[str]:
    """The modules of ours that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            found |= {
                f"{node.module}.{alias.name}"
                if f"{node.module}.{alias.name}" in MODULES
                else str(node.module)
                for alias in node.names
            }
    return found & set(MODULES)


def test_no_file_imports_one_that_imports_it() -> None:
    # A package's own file gathers what its modules have; nobody inside imports it.
    graph = {name: imports(name) for name in MODULES}
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_imports_one_above_it(package: str) -> None:
    for name, _ in modules(package):
        known = {each.split(".")[0] for each in imports(name)} - {package}
        assert known <= MAY_KNOW[package], f"{name} imports {known}"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_know_only_those_below_them(room: str) -> None:
    for name, _ in modules("llava_triton"):
        if name.split(".")[1:2] != [room]:
            continue
        ours = [each.split(".") for each in imports(name) if each.startswith("llava_triton.")]
        known = {parts[1] for parts in ours} - {room}
        assert known <= ROOMS[room], f"{name} imports {known - ROOMS[room]}"


def test_every_room_is_named() -> None:
    found = {name.split(".")[1] for name, _ in modules("llava_triton") if "." in name}
    assert found == set(ROOMS)
