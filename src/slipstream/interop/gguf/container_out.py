"""Writes a GGUF file, version 3: the inverse of container.py, for plain numbers."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from slipstream.core.files import replacing
from slipstream.interop.gguf.blocks import BY_NAME, PLAIN
from slipstream.interop.gguf.container import ALIGNMENT, ARRAY, MAGIC, NUMBERS, STRING

UINT32, INT32, FLOAT32, BOOL = 4, 5, 6, 7
IDS = {dtype: BY_NAME[name].id for name, dtype in PLAIN.items()}


def write_gguf(path: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Replace the file. settings: flags, whole and other numbers, strings, and lists of one of these."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(settings)))
        for name, value in settings.items():
            file.write(_string(name) + _typed(value))
        start = 0
        for name, tensor in tensors.items():
            sizes = tensor.shape[::-1]
            file.write(_string(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
            file.write(struct.pack("<IQ", IDS[tensor.dtype], start))
            start += _whole(tensor.nbytes)
        _pad(file)
        for tensor in tensors.values():
            raw = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
            raw.numpy().tofile(file)
            _pad(file)


def _whole(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _pad(file: BinaryIO) -> None:
    file.write(bytes(_whole(file.tell()) - file.tell()))


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, Sequence):
        return struct.pack("<I", ARRAY) + _array(value)
    kind = _kind(value)
    return struct.pack("<I", kind) + np.array(value, NUMBERS[kind]).tobytes()


def _array(values: Sequence[Any]) -> bytes:
    if not values or isinstance(values[0], str):
        return struct.pack("<IQ", STRING, len(values)) + b"".join(map(_string, values))
    kind = INT32 if _kind(values[0]) == UINT32 else _kind(values[0])
    return struct.pack("<IQ", kind, len(values)) + np.array(values, NUMBERS[kind]).tobytes()


def _kind(value: float) -> int:
    if isinstance(value, bool):
        return BOOL
    return UINT32 if isinstance(value, int) else FLOAT32
