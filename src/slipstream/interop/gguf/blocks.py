r"""The block types of ggml: so many weights in so many bytes, and what they stand for.

    Q8_0 Q5_0 Q4_0          w = d q                       32 weights, one d
    Q5_1 Q4_1               w = d q + m                   32 weights, d and m
    Q4_K Q5_K Q2_K          w = d s_j q - m t_j           256 weights, d and m; small s and t for each 32 (Q2_K: 16)
    Q6_K Q3_K               w = d s_j q                   256 weights, one d; a small s for each 16

d and m are float16. Layouts: ggml's ggml-common.h; the same numbers come out as of the package gguf, which also reads the rarer
types here if it is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float16, Int8, UInt8
from torch import Tensor

from slipstream.core.errors import InputError

PIECE = 1 << 19  # weights made at a time: bounds the memory beside the result

Blocks = UInt8[Tensor, "N S"]
Weights = Float[Tensor, "N W"]


@dataclass(frozen=True)
class BlockType:
    """So many weights in so many bytes. id: its number in files."""

    id: int
    name: str
    weights: int
    bytes: int


_SIZES = """
F32 0 1 4, F16 1 1 2, BF16 30 1 2, F64 28 1 8, Q4_0 2 32 18, Q4_1 3 32 20, Q5_0 6 32 22, Q5_1 7 32 24, Q8_0 8 32 34,
Q2_K 10 256 84, Q3_K 11 256 110, Q4_K 12 256 144, Q5_K 13 256 176, Q6_K 14 256 210,
IQ2_XXS 16 256 66, IQ2_XS 17 256 74, IQ3_XXS 18 256 98, IQ1_S 19 256 50, IQ4_NL 20 32 18, IQ3_S 21 256 110, IQ2_S 22 256 82,
IQ4_XS 23 256 136, IQ1_M 29 256 56, TQ1_0 34 256 54, TQ2_0 35 256 66, MXFP4 39 32 17
"""  # name, number, weights, bytes
TYPES = {
    int(number): BlockType(int(number), name, int(weights), int(size))
    for name, number, weights, size in (entry.split() for entry in _SIZES.split(","))
}
BY_NAME = {kind.name: kind for kind in TYPES.values()}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def weights_of(kind: BlockType, raw: UInt8[Tensor, "R S"], dtype: torch.dtype | None = None) -> Float[Tensor, "R C"]:
    """The matrix of rows of blocks, in this dtype: that of the file when None, and float32 for what is quantised there.

    Weights that have the dtype already are the file's own memory.
    """
    if kind.name in PLAIN:
        stored = raw.view(PLAIN[kind.name])
        return stored if dtype is None else stored.to(dtype)
    columns = raw.shape[1] // kind.bytes * kind.weights
    made = torch.empty(raw.shape[0], columns, dtype=dtype or torch.float32)
    step = max(1, PIECE // columns)
    for at in range(0, raw.shape[0], step):
        _write(kind, raw[at : at + step].reshape(-1, kind.bytes), made[at : at + step].view(-1, kind.weights))
    return made


def _write(kind: BlockType, blocks: Blocks, made: Weights) -> None:
    """The weights where they are wanted; those of one scale a block without a copy on the way."""
    if kind.name in WHOLE and made.dtype == torch.float32:
        codes, scales = whole_codes(kind, blocks)
        made.copy_(codes).mul_(scales.float()[:, None])
    else:
        made.copy_(dequantised(kind, blocks))


def dequantised(kind: BlockType, blocks: Blocks) -> Weights:
    """The weights of some blocks. Raises InputError for a rare type without the package that reads it."""
    if kind.name in READERS:
        return READERS[kind.name](blocks)
    try:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise InputError(f'weights of type {kind.name} are read by a package: pip install "slipstream[gguf]"') from None
    return torch.from_numpy(dequantize(blocks.numpy(), GGMLQuantizationType(kind.id)))


def whole_codes(kind: BlockType, blocks: Blocks) -> tuple[Int8[Tensor, "N 32"], Float16[Tensor, "N"]]:
    """Codes and scales of types that are w = d q with one d for 32 weights: no less than what the file has."""
    return WHOLE[kind.name](blocks), _half(blocks, 0)[:, 0]


def _half(blocks: Blocks, at: int) -> Float16[Tensor, "N 1"]:
    return blocks[:, at : at + 2].contiguous().view(torch.float16)


def _scale(blocks: Blocks, at: int) -> Float[Tensor, "N 1"]:
    return _half(blocks, at).float()


def _nibbles(packed: UInt8[Tensor, "... H"]) -> UInt8[Tensor, "... W"]:
    """First all low halves of the bytes, then all high ones."""
    return torch.cat([packed & 15, packed >> 4], -1)


def _bits(packed: Blocks) -> UInt8[Tensor, "N W"]:
    """The bits of every byte, the lowest first."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, bitorder="little"))


def _q8_0(blocks: Blocks) -> Int8[Tensor, "N 32"]:
    return blocks[:, 2:].view(torch.int8)


def _q4_0(blocks: Blocks) -> Int8[Tensor, "N 32"]:
    return _nibbles(blocks[:, 2:]).view(torch.int8) - 8


def _q5_0(blocks: Blocks) -> Int8[Tensor, "N 32"]:
    return (_nibbles(blocks[:, 6:]) | _bits(blocks[:, 2:6]) << 4).view(torch.int8) - 16


WHOLE: dict[str, Callable[[Blocks], Int8[Tensor, "N 32"]]] = {"Q8_0": _q8_0, "Q5_0": _q5_0, "Q4_0": _q4_0}


def _scaled(codes: Callable[[Blocks], Int8[Tensor, "N 32"]]) -> Callable[[Blocks], Weights]:
    return lambda blocks: codes(blocks) * _scale(blocks, 0)


def _q4_1(blocks: Blocks) -> Weights:
    return _nibbles(blocks[:, 4:]) * _scale(blocks, 0) + _scale(blocks, 2)


def _q5_1(blocks: Blocks) -> Weights:
    return (_nibbles(blocks[:, 8:]) | _bits(blocks[:, 4:8]) << 4) * _scale(blocks, 0) + _scale(blocks, 2)


def _k_scales(packed: UInt8[Tensor, "N 12"]) -> tuple[UInt8[Tensor, "N 8"], UInt8[Tensor, "N 8"]]:
    """Eight scales and eight minima of 6 bits each: the upper two bits of the last four lie above the first four."""
    low, mid, high = packed.split(4, 1)
    scales = torch.cat([low & 63, high & 15 | low >> 2 & 48], 1)
    return scales, torch.cat([mid & 63, high >> 4 | mid >> 2 & 48], 1)


def _with_minima(blocks: Blocks, codes: UInt8[Tensor, "N 8 32"]) -> Weights:
    scales, minima = _k_scales(blocks[:, 4:16])
    d, m = (_scale(blocks, 0) * scales)[..., None], (_scale(blocks, 2) * minima)[..., None]
    return (d * codes - m).flatten(1)


def _q4_k(blocks: Blocks) -> Weights:
    return _with_minima(blocks, _nibbles(blocks[:, 16:].unflatten(1, (4, 32))).view(-1, 8, 32))


def _q5_k(blocks: Blocks) -> Weights:
    low = _nibbles(blocks[:, 48:].unflatten(1, (4, 32))).view(-1, 8, 32)
    high = _bits(blocks[:, 16:48]).view(-1, 32, 8).mT
    return _with_minima(blocks, low | high << 4)


def _quarters(packed: UInt8[Tensor, "... W"]) -> UInt8[Tensor, "... 4 W"]:
    """Four numbers of 2 bits a byte, the lowest of all bytes first."""
    return packed[..., None, :] >> torch.arange(0, 8, 2, dtype=torch.uint8)[:, None] & 3


def _q6_k(blocks: Blocks) -> Weights:
    low = _nibbles(blocks[:, :128].unflatten(1, (2, 64)))  # (N 2 128)
    high = _quarters(blocks[:, 128:192].unflatten(1, (2, 32))).flatten(2)
    codes = (low | high << 4).view(torch.int8) - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8)
    return ((_scale(blocks, 208) * scales)[..., None] * codes.view(-1, 16, 16)).flatten(1)


def _q2_k(blocks: Blocks) -> Weights:
    codes = _quarters(blocks[:, 16:80].unflatten(1, (2, 32))).reshape(-1, 16, 16)
    scales = blocks[:, :16]
    d, m = _scale(blocks, 80) * (scales & 15), _scale(blocks, 82) * (scales >> 4)
    return (d[..., None] * codes - m[..., None]).flatten(1)


def _q3_k(blocks: Blocks) -> Weights:
    low = _quarters(blocks[:, 32:96].unflatten(1, (2, 32))).reshape(-1, 16, 16)
    high = _bits(blocks[:, :32]).view(-1, 32, 8).mT.reshape(-1, 16, 16)
    codes = low.view(torch.int8) - ((1 - high) << 2).view(torch.int8)  # where the bit is not set, four less
    packed = blocks[:, 96:108]
    scales = (_nibbles(packed[:, :8]) | _quarters(packed[:, 8:]).flatten(1) << 4).view(torch.int8) - 32
    return ((_scale(blocks, 108) * scales)[..., None] * codes).flatten(1)


READERS: dict[str, Callable[[Blocks], Weights]] = {
    **{name: _scaled(codes) for name, codes in WHOLE.items()},
    "Q4_1": _q4_1,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
}
