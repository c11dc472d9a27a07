"""A GGUF file as it lies on disk: settings, and where every tensor is. Nothing here knows of models.

    magic "GGUF" | version | counts | settings: name, type, value | tensors: name, sizes, type, offset | data

Files come from strangers. Every length is compared with what is left of the file before anything is made of it, tensors must
lie inside the file, aligned and apart from each other; what does not is refused in words. A large model may be in several files,
NAME-00001-of-00003.gguf and so on: its settings are in the first, its tensors in all. Source: the description of the format in
ggml's docs/gguf.md; versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.interop.gguf.blocks import TYPES, BlockType

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
FLOAT32, STRING, ARRAY = 6, 8, 9
MOST_DIMS, LONGEST_NAME = 4, 1 << 16
PART, MOST_PARTS = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf"), 1 << 10


@dataclass(frozen=True)
class Stored:
    """One tensor: shape as torch has it (the fastest axis last), where its bytes are. part: in which file, from 0."""

    name: str
    shape: tuple[int, ...]
    kind: BlockType
    start: int
    part: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.kind.weights * self.kind.bytes


class GGUF:
    """An open file, or all files of a model. settings: numbers, flags, strings, and arrays: of numbers as numpy has them, of
    strings as lists.

    Their memory is mapped, copied on writing: tensors that are used as they lie there cost nothing until they are read, and the
    files must stay as they are as long as they live.
    """

    def __init__(self, path: Path) -> None:
        """path: of any part. Raises InputError when it is no GGUF file, or a damaged one, or parts are missing."""
        self.path = path
        self.maps: list[np.ndarray] = []
        self.settings: dict[str, Any] = {}
        self.tensors: dict[str, Stored] = {}
        for part, file in enumerate(parts := parts_of(path)):
            self._open(part, file, len(parts))
        if self.settings.get("split.tensors.count", len(self.tensors)) != len(self.tensors):
            raise InputError(f"{path}: its parts do not have all tensors of the model; download them again")

    def _open(self, part: int, file: Path, count: int) -> None:
        try:
            self.maps.append(np.memmap(file, np.uint8, mode="c"))
        except (OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read ({error})") from None
        settings, tensors = _Reader(self.maps[-1], file).file()
        if settings.get("split.count", 1) not in ((0, 1) if count == 1 else (count,)):
            raise InputError(
                f"{file} says that it is one of {settings['split.count']} parts; they are called NAME-00001-of-00003.gguf, ..."
            )
        if settings.get("split.no", part) != part or tensors.keys() & self.tensors.keys():
            raise InputError(f"{file} is not part {part + 1} of the model, as its name says; download it again")
        self.settings = self.settings or settings
        self.tensors |= {name: replace(t, part=part) for name, t in tensors.items()}

    def raw(self, name: str) -> Tensor:
        """The bytes of a tensor, its rows along the first axis: all axes but the last are one."""
        t = self.tensors[name]
        rows = math.prod(t.shape[:-1])
        return torch.from_numpy(np.asarray(self.maps[t.part][t.start : t.start + t.nbytes])).view(rows, -1)


def parts_of(path: Path) -> list[Path]:
    """All files of the model that this one is of. Raises InputError with the first that is missing."""
    if not (named := PART.fullmatch(path.name)):
        return [path]
    count = int(named[3])
    if not 1 <= int(named[2]) <= count <= MOST_PARTS:
        raise InputError(f"{path.name} cannot be the name of one of {count} parts")
    parts = [path.with_name(f"{named[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    if missing := [p for p in parts if not p.is_file()]:
        raise InputError(f"{path.name} is one of {count} parts, and {missing[0]} is not there; download it too")
    return parts


class _Reader:
    """Walks along the header."""

    def __init__(self, data: np.ndarray, path: Path) -> None:
        self.data, self.bytes, self.at, self.path = data, memoryview(data.data), 0, path

    def file(self) -> tuple[dict[str, Any], dict[str, Stored]]:
        if bytes(self._take(4)) != MAGIC:
            raise InputError(f"{self.path} is no GGUF file (its first bytes are not GGUF)")
        version = self._number("<I")
        if version not in VERSIONS:
            raise self._wrong(f"version {version} is not read here, only little-endian 2 and 3")
        n_tensors, n_settings = self._number("<Q"), self._number("<Q")
        settings: dict[str, Any] = {}
        for _ in range(n_settings):
            name = self._string()
            if name in settings:
                raise self._wrong(f"the setting {name!r:.80} is there twice")
            settings[name] = self._value(self._number("<I"))
        return settings, self._tensors(n_tensors, settings.get("general.alignment", ALIGNMENT))

    def _tensors(self, count: int, alignment: Any) -> dict[str, Stored]:
        if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment % 8:
            raise self._wrong(f"general.alignment {alignment!r:.40} must be a multiple of 8")
        found = dict[str, Stored]()
        for _ in range(count):
            tensor = self._tensor(alignment)
            if tensor.name in found:
                raise self._wrong(f"the tensor {tensor.name!r:.80} is there twice")
            found[tensor.name] = tensor
        begin = -(-self.at // alignment) * alignment
        placed = [Stored(t.name, t.shape, t.kind, begin + t.start) for t in found.values()]
        self._check_places(placed)
        return {t.name: t for t in placed}

    def _tensor(self, alignment: int) -> Stored:
        name, n_dims = self._string(), self._number("<I")
        if not 1 <= n_dims <= MOST_DIMS:
            raise self._wrong(f"{name!r:.80} has {n_dims} axes")
        shape = tuple(self._number("<Q") for _ in range(n_dims))[::-1]
        kind, start = self._number("<I"), self._number("<Q")
        if kind not in TYPES:
            raise self._wrong(f"{name!r:.80} is of a type {kind} that slipstream does not know")
        if min(shape) < 1 or max(shape) > len(self.data) * 8 or shape[-1] % TYPES[kind].weights:
            raise self._wrong(f"{name!r:.80} cannot be {TYPES[kind].name} {list(shape)}")
        if start % alignment:
            raise self._wrong(f"{name!r:.80} begins at {start}, which is no multiple of {alignment}")
        return Stored(name, shape, TYPES[kind], start)

    def _check_places(self, tensors: list[Stored]) -> None:
        """Inside the file, and none over another."""
        ordered = sorted(tensors, key=lambda t: t.start)
        for t in ordered:
            if t.start + t.nbytes > len(self.data):
                raise self._wrong(f"the bytes of {t.name!r:.80} reach beyond its end")
        for before, after in pairwise(ordered):
            if before.start + before.nbytes > after.start:
                raise self._wrong(f"{before.name!r:.80} and {after.name!r:.80} lie over each other")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string("replace")
        if kind == ARRAY:
            return self._array()
        number = self._numbers(kind, 1)[0]
        return float(str(number)) if kind == FLOAT32 else number.item()  # 1e-6, not its nearest float32's long tail

    def _array(self) -> Any:
        kind, count = self._number("<I"), self._number("<Q")
        if kind != STRING:
            return self._numbers(kind, count)
        if count * 8 > len(self.data) - self.at:
            raise self._cut_short()
        return _strings(self.bytes, self.at, count, self._go_to, self._cut_short)

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in NUMBERS:
            raise self._wrong(f"a setting is of a type {kind} that is not read here")
        dtype = np.dtype(NUMBERS[kind])
        raw = self._take(count * dtype.itemsize)
        return np.frombuffer(raw, np.uint8).astype(bool) if kind == 7 else np.frombuffer(raw, dtype)

    def _string(self, errors: str = "strict") -> str:
        size = self._number("<Q")
        if errors == "strict" and size > LONGEST_NAME:
            raise self._wrong(f"a name has {size} bytes")
        try:
            return str(self._take(size), "utf-8", errors)
        except UnicodeDecodeError:
            raise self._wrong("a name in it is no text") from None

    def _number(self, form: str) -> int:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise self._cut_short()
        self.at += size
        return self.bytes[self.at - size : self.at]

    def _go_to(self, at: int) -> None:
        self.at = at

    def _wrong(self, what: str) -> InputError:
        return InputError(f"{self.path} is damaged or no model: {what}; download it again")

    def _cut_short(self) -> InputError:
        return self._wrong("it ends where more should come")


def _strings(
    data: memoryview, at: int, count: int, done: Callable[[int], None], cut_short: Callable[[], InputError]
) -> list[str]:
    """Many strings in a row: a vocabulary has 262,144, so this loop does no more than it must."""
    found, size = [], struct.Struct("<Q").unpack_from
    end = len(data)
    for _ in range(count):
        if at + 8 > end:
            raise cut_short()
        start = at + 8
        at = start + size(data, at)[0]
        if at > end:
            raise cut_short()
        found.append(str(data[start:at], "utf-8", "replace"))
    done(at)
    return found
