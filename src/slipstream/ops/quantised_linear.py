r"""The projection of every token by a matrix that is kept in 8 or 4 bits a weight.

    y = x W^T + bias        W_oi = s_og c_oi, one scale s for each group g of a row's inputs

The codes c are whole numbers from -127 to 127: with 8 bits any of them, and s is the group's largest weight over 127; with
4 bits one of 16 LEVELS, those of least square error for normal weights in groups of 32 (a quantiser of Lloyd's), and s is
searched for. Levels at equal distances have a larger error at the same size (see `pack`).

The torch form makes W again, and its product is differentiable in x. The kernel for CPUs never does: it rounds each 32
activations to 8 bits as they come and multiplies bytes, which adds an error of about 0.5 % of what is summed. Scales are
float16: a row of weights all below about 1e-6 loses digits.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float16, Int, Int32, Shaped, UInt8
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.ops.dispatch import operator

Bits = Literal[8, 4]
Codes = Shaped[
    Tensor, "N Q 16 4"
]  # int8, four columns of 16 rows together; uint8, two such fours in the halves of its bytes
Scales = Float16[Tensor, "N G 16"]
TILE = 16  # rows whose codes lie together, so that a vector holds as many sums
LEVELS = (-127, -101, -81, -64, -49, -36, -23, -10, 2, 14, 27, 40, 55, 71, 90, 113)
SPANS = (0.75, 0.85, 0.95, 1.05)  # of the largest weight that the first level is tried at
PIECE = 1 << 22  # weights packed at a time: bounds the memory of the search


@operator("x")
def quantised_linear(
    x: Float[Tensor, "*A I"], codes: Codes, scales: Scales, outputs: int, bias: Float[Tensor, "O"] | None = None
) -> Float[Tensor, "*A O"]:
    """y (..., outputs) in x's dtype. codes, scales: as `pack` makes them."""
    return F.linear(x, dequantise(codes, scales, outputs, x.shape[-1], x.dtype), bias)


def reference(
    x: Float[Tensor, "*A I"], codes: Codes, scales: Scales, outputs: int, bias: Float[Tensor, "O"] | None = None
) -> Float[Tensor, "*A O"]:
    """Code by code."""
    four = codes.dtype == torch.uint8
    group = codes.shape[1] * (8 if four else 4) // scales.shape[1]
    columns = []
    for o in range(outputs):
        tile, row = divmod(o, TILE)
        y = x.new_zeros(x.shape[:-1]) + (0 if bias is None else bias[o])
        for i in range(x.shape[-1]):
            step, place = divmod(i, 8 if four else 4)
            code = int(codes[tile, step, row, place % 4])
            code = LEVELS[code >> 4 if place >= 4 else code & 15] if four else code
            y = y + x[..., i] * (scales[tile, i // group, row].to(x.dtype) * code)
        columns.append(y)
    return torch.stack(columns, -1)


def pack(weight: Float[Tensor, "O I"], bits: Bits, group: int = 32) -> tuple[Codes, Scales]:
    """Codes and scales of a matrix. For normal weights and groups of 32 the root mean square of the error is 0.5 % of that of
    the weights with 8 bits, and 7.5 % with 4; equal distances would make it 8.1 %, or 7.4 % with a minimum beside
    every scale, which costs half a bit more."""
    parts = weight.detach().split(max(TILE, PIECE // max(weight.shape[1], 1) // TILE * TILE))
    packed = [_pack(part.to(torch.float32), bits, group) for part in parts]
    return torch.cat([codes for codes, _ in packed]), torch.cat([scales for _, scales in packed])


def packed_shapes(outputs: int, inputs: int, bits: Bits, group: int = 32) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of codes and of scales."""
    tiles, groups = -(-outputs // TILE), -(-inputs // group)
    return (tiles, groups * group * bits // 32, TILE, 4), (tiles, groups, TILE)


def _pack(weight: Float[Tensor, "O I"], bits: Bits, group: int) -> tuple[Codes, Scales]:
    O, I = weight.shape
    w = F.pad(weight, (0, -I % group, 0, -O % TILE)).unflatten(1, (-1, group))  # (rows groups group)
    largest = w.abs().amax(-1)
    if not bool((largest < 127 * torch.finfo(torch.float16).max).all()):
        raise InputError(
            "a matrix with NaN, infinite or enormous weights (above 8e6) cannot be quantised: repair it first"
        )
    scales, codes = _whole(w, largest) if bits == 8 else _nearest_levels(w)
    if bits == 4:
        low, high = codes.flatten(1).unflatten(1, (-1, 2, 4)).unbind(2)
        codes = low | high << 4
    return tiled(codes.flatten(1), scales)


def tiled(codes: Shaped[Tensor, "R C"], scales: Float16[Tensor, "R G"]) -> tuple[Codes, Scales]:
    """Row by row, in the order in which they are kept: for weights that come as codes and scales. R: a multiple of TILE."""
    fours = codes.contiguous().view(torch.int32).unflatten(0, (-1, TILE))  # which move together
    by_tiles = fours.mT.contiguous().view(codes.dtype).unflatten(2, (TILE, 4))
    return by_tiles, scales.unflatten(0, (-1, TILE)).mT.contiguous()


def _whole(w: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    scales = (largest / 127).half()
    return scales, (w * _inverse(scales)).round_().clamp_(-127, 127).to(torch.int8)


def _nearest_levels(w: Tensor) -> tuple[Tensor, Tensor]:
    """For each group the scale, of those tried, whose levels come nearest; its sign is such that the largest weight meets the
    first level. Every one that is tried is brought to the least squares of its codes."""
    nearest = _nearest(w.device)
    levels = torch.tensor(LEVELS, dtype=w.dtype, device=w.device).index_select(0, nearest.int())
    peak = w.gather(-1, w.abs().argmax(-1, keepdim=True))[..., 0] / LEVELS[0]
    best, gain = peak.half(), torch.zeros_like(peak)
    for span in SPANS:
        near = levels.index_select(0, _whole_index(w, (peak * span).half())).view_as(w)
        along, size = (w * near).sum(-1), near.square().sum(-1)
        scales = (along / size).half()
        wide = scales.float()
        less = wide * (2 * along - wide * size)  # by so much is the squared error below that of all zeros
        best, gain = torch.where(less > gain, scales, best), torch.maximum(less, gain)
    return best, nearest.index_select(0, _whole_index(w, best)).view_as(w)


def _nearest(device: torch.device) -> UInt8[Tensor, "256"]:
    """The code whose level is nearest to -127, -126, ..., 128."""
    away = torch.arange(-127, 129, device=device)[:, None] - torch.tensor(LEVELS, device=device)
    return away.abs().argmin(1).to(torch.uint8)


def _whole_index(w: Tensor, scales: Tensor) -> Int32[Tensor, "X"]:
    """Weights in units of the scales, as places in such a table."""
    return (w * _inverse(scales)).add_(127.5).clamp_(0, 255).to(torch.int32).flatten()


def _inverse(scales: Tensor) -> Tensor:
    """1 / s for each of a group; 0 where s is."""
    wide = scales.float()[..., None]
    return torch.where(wide == 0, 0, 1 / wide)


def dequantise(
    codes: Codes, scales: Scales, outputs: int, inputs: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "O I"]:
    """The matrix."""
    rows, by_row = codes.transpose(1, 2).flatten(0, 1), scales.mT.flatten(0, 1)
    return _values(rows[:outputs], by_row[:outputs], inputs, dtype)


def dequantise_rows(
    codes: Codes, scales: Scales, index: Int[Tensor, "*A"], inputs: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*A I"]:
    """Some rows of the matrix, in any shape: what an embedding looks up."""
    tile, row = index // TILE, index % TILE
    return _values(codes[tile, :, row], scales[tile, :, row], inputs, dtype)


def _values(codes: Shaped[Tensor, "*A Q 4"], scales: Tensor, inputs: int, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    if codes.dtype == torch.uint8:
        levels = torch.tensor(LEVELS, dtype=wide, device=codes.device)
        values = levels[torch.stack([codes & 15, codes >> 4], -2).int()].flatten(-3)
    else:
        values = codes.to(wide).flatten(-2)
    groups = values.unflatten(-1, (scales.shape[-1], -1))
    return (groups * scales[..., None].to(wide)).flatten(-2)[..., :inputs].to(dtype)
