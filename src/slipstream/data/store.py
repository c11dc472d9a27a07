"""Tokens on disk, memory-mapped: a second run on the same text and tokenizer finds them there.

A folder <key>/ holds tokens.npy, bytes.npy (bytes of text each token stands for), tokenizer.json; key = hash of text
and tokenizer. It is filled under another name and renamed, so a folder that is there is whole.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from slipstream.data.source import Text
from slipstream.data.tokenizer import encode, is_bytes, make_tokenizer


@dataclass(frozen=True, eq=False)
class Tokens:
    """A text as tokens. key: a hash of the text and the tokenizer: the same key, the same tokens."""

    ids: np.ndarray
    sizes: np.ndarray  # bytes of text each token stands for
    tokenizer: Tokenizer
    key: str


def tokenize(text: Text, spec: str, folder: Path | None = None) -> Tokens:
    """Encode the text, or find it encoded in the folder. Writes nothing."""
    key = _key(text.content, spec)
    if folder is not None and (folder / key).is_dir():
        return _open(folder / key)
    tokenizer = make_tokenizer(spec, text.content)
    return Tokens(*encode(tokenizer, text.content), tokenizer, key)


def stored(folder: Path, key: str) -> Tokens | None:
    """What store left in the folder, if it did."""
    return _open(folder / key) if (folder / key).is_dir() else None


def store(tokens: Tokens, folder: Path) -> Tokens:
    """The same tokens, from files in the folder."""
    home = folder / tokens.key
    if not home.is_dir():
        _fill(home, tokens)
    return _open(home)


def _key(content: bytes, spec: str) -> str:
    named = Path(spec).read_bytes() if Path(spec).is_file() else spec.encode()
    return hashlib.sha256(hashlib.sha256(content).digest() + named).hexdigest()[:16]


def _fill(home: Path, tokens: Tokens) -> None:
    partial = home.with_name(f".{home.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        np.save(partial / "tokens.npy", tokens.ids)
        if not is_bytes(tokens.tokenizer):
            np.save(partial / "bytes.npy", tokens.sizes)
        (partial / "tokenizer.json").write_text(tokens.tokenizer.to_str(), encoding="utf-8")
        if not home.is_dir():  # another process may have been quicker
            os.replace(partial, home)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _open(home: Path) -> Tokens:
    ids = np.load(home / "tokens.npy", mmap_mode="r")
    sizes = home / "bytes.npy"
    each = np.load(sizes, mmap_mode="r") if sizes.is_file() else np.broadcast_to(np.uint8(1), len(ids))
    return Tokens(ids, each, Tokenizer.from_file(str(home / "tokenizer.json")), home.name)
