"""What each mixer says of itself, read from its file without running it (so that `slipstream list` needs no torch).

A mixer file is found by walking slipstream/mixers and the entry-point group `slipstream.mixers` of other packages.
Names are those of a file's class line: `class X(Mixer, name="x", family="delta")`.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from slipstream.core.errors import InputError, nearest


@dataclass(frozen=True)
class Card:
    """One mixer as its file states it. fields: Config field -> (type, default or "", comment)."""

    name: str
    family: str
    class_name: str
    module: str
    path: Path
    title: str
    equation: str
    paper: str
    use_when: str
    writes: str
    erases: str
    decays: str
    reads: str
    train_order: str
    decode_order: str
    remembers: bool
    grows: bool
    windowed: bool
    fields: dict[str, tuple[str, str, str]] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The first paper's authors and year."""
        found = re.match(r".*?\b\d{4}", self.paper)
        return found[0] if found else self.paper

    @property
    def state_growth(self) -> str:
        """How the memory of one sequence grows with its length."""
        if not self.remembers:
            return "none"
        return "grows" if self.grows else "window" if self.windowed else "constant"


def from_file(path: Path) -> Card:
    """The card of a mixer in a file of one's own, which is then known by its name for the rest of the process."""
    if not path.is_file():
        raise InputError(f"no file {path}; slipstream new-mixer NAME writes one")
    found = _read(path.stem, path.resolve())
    if not found:
        raise InputError(
            f'{path} declares no mixer; it needs a class line like: class X(Mixer, name="x", family="linear")'
        )
    if (known := cards().get(found[0].name)) and known.path != found[0].path:
        raise InputError(f"mixer {known.name!r} is declared twice: {known.path} and {path}")
    sys.path.insert(0, str(path.resolve().parent))
    cards()[found[0].name] = found[0]
    return found[0]


@cache
def cards() -> dict[str, Card]:
    """Every mixer there is, by name. Raises InputError when two files declare the same name."""
    found: dict[str, Card] = {}
    for module, path in _files():
        for card in _read(module, path):
            if card.name in found:
                raise InputError(f"mixer {card.name!r} is declared twice: {found[card.name].path} and {card.path}")
            found[card.name] = card
    return dict(sorted(found.items(), key=lambda item: (item[1].family, item[0])))


def card(name: str) -> Card:
    """The card of one mixer. Raises InputError with the nearest names."""
    if name not in cards():
        raise InputError(f"no mixer is called {name!r}; {nearest(name, cards())}")
    return cards()[name]


def _files() -> list[tuple[str, Path]]:
    root = Path(__file__).parent.parent
    own = [(_module_name(p, root), p) for p in sorted((root / "mixers").rglob("*.py")) if p.name != "__init__.py"]
    others = [
        (e.module, Path(spec.origin))
        for e in entry_points(group="slipstream.mixers")
        if (spec := importlib.util.find_spec(e.module)) and spec.origin
    ]
    return own + others


def _module_name(path: Path, root: Path) -> str:
    return ".".join(("slipstream", *path.relative_to(root).with_suffix("").parts))


def _read(module: str, path: Path) -> list[Card]:
    source = path.read_text(encoding="utf-8")
    if "name=" not in source:
        return []
    tree = ast.parse(source, str(path))
    title, equation = _docstring(ast.get_docstring(tree, clean=False) or "")
    return [
        _card(node, tree, source, module, path, title, equation)
        for node in tree.body
        if isinstance(node, ast.ClassDef) and any(k.arg == "name" for k in node.keywords)
    ]


def _card(
    node: ast.ClassDef, tree: ast.Module, source: str, module: str, path: Path, title: str, equation: str
) -> Card:
    keywords = {k.arg: ast.literal_eval(k.value) for k in node.keywords}
    facts = dict(fact for a in node.body if isinstance(a, ast.Assign) for fact in _constants(a))
    text, fields = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno]), _fields(node, tree, source)
    return Card(
        name=keywords["name"],
        family=keywords.get("family", ""),
        class_name=node.name,
        module=module,
        path=path,
        title=title,
        equation=equation,
        paper=facts.get("paper", ""),
        use_when=facts.get("use_when", ""),
        writes=facts.get("writes", ""),
        erases=facts.get("erases", ""),
        decays=facts.get("decays", ""),
        reads=facts.get("reads", ""),
        train_order=facts.get("train_order", "T"),
        decode_order=facts.get("decode_order", "1"),
        remembers=all(ast.unparse(base) not in ("PerToken", "RoutedPerToken", "Bidirectional") for base in node.bases),
        grows="grows=True" in text or "cache" in fields,
        windowed="window" in fields,
        fields=fields,
    )


def _constants(assignment: ast.Assign) -> list[tuple[str, str]]:
    """name = "text", or a, b = "text", "text"."""
    target, value = assignment.targets[0], assignment.value
    names, values = (
        (target.elts, value.elts)
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
        else ([target], [value])
    )
    pairs = [(n, v) for n, v in zip(names, values) if isinstance(n, ast.Name) and isinstance(v, ast.Constant)]
    return [(n.id, v.value) for n, v in pairs if isinstance(v.value, str)]


def _docstring(text: str) -> tuple[str, str]:
    """A mixer file's first line, and its indented block: the equation."""
    title, _, rest = text.partition("\n")
    equation = [line for line in rest.splitlines() if line.startswith("    ") or not line.strip()]
    return title.rstrip("."), "\n".join(equation).strip("\n")


def _fields(node: ast.ClassDef, tree: ast.Module, source: str) -> dict[str, tuple[str, str, str]]:
    config = next((n for n in node.body if isinstance(n, ast.ClassDef) and n.name == "Config"), None)
    own = _with_inherited(config, tree, source) if config else {}
    return {"d_model": ("int", "", "width of the residual stream")} | own


def _with_inherited(node: ast.ClassDef, tree: ast.Module, source: str) -> dict[str, tuple[str, str, str]]:
    """Fields of a settings class, those of its bases first."""
    fields: dict[str, tuple[str, str, str]] = {}
    for base in node.bases:
        fields |= _inherited(base.id, tree) if isinstance(base, ast.Name) else {}
    return fields | _annotated(node, source)


def _inherited(name: str, tree: ast.Module) -> dict[str, tuple[str, str, str]]:
    """Fields of a settings class that the file imports."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and any(a.name == name for a in node.names):
            return _imported(name, node.module)
    return {}


@cache
def _imported(name: str, module: str) -> dict[str, tuple[str, str, str]]:
    """The same from the module. Few are shared by many, and whoever asks waits for a first token."""
    spec = importlib.util.find_spec(module)
    source = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
    home = ast.parse(source)
    classes = [n for n in home.body if isinstance(n, ast.ClassDef) and n.name == name]
    fields = {k: v for c in classes for k, v in _with_inherited(c, home, source).items()}
    return {k: v for k, v in fields.items() if k != "d_model"}


def _annotated(node: ast.ClassDef, source: str) -> dict[str, tuple[str, str, str]]:
    """name: type = default  # comment"""
    lines, found = source.splitlines(), {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            comment = lines[item.lineno - 1].partition("#")[2].strip()
            found[item.target.id] = (ast.unparse(item.annotation), _default(item.value), comment)
    return found


def _default(value: ast.expr | None) -> str:
    """The default as written; of Field(default, ...), its first argument."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "Field" and value.args:
        value = value.args[0]
    return ast.unparse(value) if value else ""
