"""Where text comes from: a file, a folder, standard input, or the novel that comes with slipstream."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from slipstream.core.errors import InputError, nearest
from slipstream.data.decode import decode

NOVEL = "pride-and-prejudice"
HELD_OUT = 0.1  # share of a text, its end, that nothing is trained on


@dataclass(frozen=True)
class Text:
    """One text in UTF-8. name: what a run of it is called. notes: what was skipped or changed on the way in."""

    name: str
    content: bytes
    notes: tuple[str, ...] = ()


def read_text(source: str | Path | None = None) -> Text:
    """The text of a file, of all text files below a folder in sorted order, of standard input ("-"), or the novel.

    Raises InputError for what is missing (with the nearest names), empty or binary.
    """
    if source is None:
        return Text(NOVEL, (files("slipstream.data") / "texts" / f"{NOVEL}.txt").read_bytes())
    if str(source) == "-":
        return _one("stdin", sys.stdin.buffer.read(), "standard input")
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    return _one(path.stem, _read(path), str(path))


def run_name(source: str | Path | None) -> str:
    """The name read_text would give, without reading."""
    if source is None:
        return NOVEL
    path = Path(source).expanduser()
    return "stdin" if str(source) == "-" else path.resolve().name if path.is_dir() else path.stem


def _one(name: str, content: bytes, called: str) -> Text:
    if not content.strip():
        raise InputError(f"{called} is empty ({len(content)} bytes); give a text to read")
    text, note = decode(content, called)
    return Text(name, text.encode("utf-8"), (note,) if note else ())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        folder = path.parent
        if not folder.is_dir():
            raise InputError(f"no file {path}: there is no folder {folder}") from None
        names = [p.name for p in folder.iterdir() if not p.name.startswith(".")]
        hint = nearest(path.name, get_close_matches(path.name, names) or sorted(names)[:8])
        raise InputError(f"no file {path}; {hint if names else 'its folder is empty'}") from None
    except PermissionError:
        raise InputError(f"{path} may not be read; change its permissions") from None


def _folder(root: Path) -> Text:
    """All files below that are text, hidden ones left out, joined by a newline."""
    texts: list[bytes] = []
    notes: list[str] = []
    skipped: list[str] = []
    for path in _below(root):
        try:
            one = _one(path.stem, _read(path), str(path.relative_to(root)))
        except InputError:
            skipped.append(str(path.relative_to(root)))
            continue
        texts.append(one.content)
        notes.extend(one.notes)
    if not texts:
        raise InputError(f"no text in the folder {root} ({len(skipped)} other files); give a folder with text files")
    if skipped:
        named = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        notes.append(f"read {len(texts)} files; skipped {len(skipped)} that are empty or no text: {named}")
    return Text(root.resolve().name, b"\n".join(texts), tuple(notes))


def _below(root: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [Path(folder, n) for n in names if not n.startswith(".")]
    return sorted(path for path in found if path.is_file())
