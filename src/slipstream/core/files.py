"""Files appear whole or not at all, and those of strangers are read with care."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slipstream.core.errors import InputError

LARGEST_JSON = 64 << 20  # bytes: a tokenizer of the largest vocabularies is half of it


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises InputError when it is too large or damaged; FileNotFoundError when there is none."""
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise InputError(f"{path} is {size} bytes, too many for what its name says")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # no JSON, no text, too large a number, or too deep
        raise InputError(
            f"{path} is no JSON ({' '.join(str(error).split()):.120}); write or download it again"
        ) from None


def read_table(path: Path) -> dict[str, Any]:
    """The same, of a JSON file that holds a table."""
    table = read_json(path)
    if not isinstance(table, dict):
        raise InputError(f"{path} holds a {type(table).__name__}, not a table of settings")
    return table


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; on success it takes the name, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        temporary.chmod(
            path.parent.stat().st_mode & 0o666
        )  # as readable as its folder: safetensors makes files private
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
