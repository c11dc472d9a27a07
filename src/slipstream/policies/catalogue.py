"""What each policy says of itself, read from its file without running it (so that `slipstream list --policies` needs no torch)."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

KINDS = {"caches": "cache", "prefills": "prefill_policy"}  # folder -> the setting that names such a policy


@dataclass(frozen=True)
class PolicyCard:
    """setting: of a mixer, that takes it. takes: what stands behind its colon; "" for nothing. about: its file's docstring."""

    name: str
    setting: str
    title: str
    takes: str
    paper: str
    about: str


def policy_cards() -> list[PolicyCard]:
    """Every policy, by setting and name; the one that leaves nothing out first."""
    folder = Path(__file__).parent
    found = [
        c for kind, setting in KINDS.items() for path in (folder / kind).glob("*.py") for c in _read(path, setting)
    ]
    return sorted(found, key=lambda c: (c.setting, c.name not in ("full", "dense"), c.name))


def _read(path: Path, setting: str) -> list[PolicyCard]:
    """Those of a file's classes that say name="..." in their class line."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    about = ast.get_docstring(tree) or ""
    title = about.partition("\n")[0].rstrip(".")
    named = [
        (ast.literal_eval(keyword.value), _constants(node))
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for keyword in node.keywords
        if keyword.arg == "name"
    ]
    return [PolicyCard(name, setting, title, facts.get("takes", ""), facts["paper"], about) for name, facts in named]


def _constants(node: ast.ClassDef) -> dict[str, str]:
    """paper and takes, as the class states them."""
    stated = [line for line in node.body if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name)]
    said = {ast.unparse(line.targets[0]): line.value for line in stated}
    return {name: ast.literal_eval(said[name]) for name in ("paper", "takes") if name in said}
