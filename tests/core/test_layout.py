"""The house: imports point down, files and functions keep their size, names say something."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import slipstream

ROOT = Path(slipstream.__file__).parent
ROOMS = [
    "core",
    "ops",
    "layers",
    "policies",
    "mixers",
    "laws",
    "models",
    "objectives",
    "data",
    "train",
    "generate",
    "interop",
    "bench",
    "convert",
    "serve",
    "compare",
    "advise",
    "report",
    "cli",
]
FILES = sorted(ROOT.rglob("*.py"))
EMPTY_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "tools"}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module] if node.module != "slipstream" else [f"slipstream.{a.name}" for a in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("slipstream.")}
    return found & set(ROOMS)


@pytest.mark.parametrize("path", [f for f in FILES if f.parent != ROOT], ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_down(path):
    assert room(path) in ROOMS, f"{room(path)} is no room of the house"
    above = set(ROOMS[ROOMS.index(room(path)) + 1 :])
    assert not imported_rooms(path) & above


def test_no_mixer_imports_a_mixer():
    mixers = [f for f in FILES if room(f) == "mixers" and f.name != "__init__.py"]
    assert mixers
    for path in mixers:
        assert "mixers" not in imported_rooms(path), path


@pytest.mark.parametrize("path", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_sizes_and_names(path):
    source = path.read_text()
    assert len(source.splitlines()) <= (200 if room(path) == "mixers" else 400)
    assert path.stem not in EMPTY_NAMES and path.parent.name not in EMPTY_NAMES
    tree = ast.parse(source)
    assert ast.get_docstring(tree), "a file says what it is"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is longer than 60 lines"


def test_mixers_are_told_apart_by_their_contract_alone():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("hasattr", "isinstance")
            ):
                assert "Mixer" not in ast.unparse(node) and "mixer" not in ast.unparse(node.args[0]), (
                    f"{path}: {ast.unparse(node)}"
                )
