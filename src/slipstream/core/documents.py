"""Packed documents: several in one row, as right-padded rows of their own and back.

Documents are grouped by length, so that padding at most doubles the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.errors import InputError


def check_cu_seqlens(cu_seqlens: Int[Tensor, "N"], tokens: int) -> list[int]:
    """The boundaries as integers. Raises InputError unless they rise from 0 to the number of tokens."""
    bounds = cu_seqlens.tolist()
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != tokens or any(b < a for a, b in pairwise(bounds)):
        raise InputError(f"cu_seqlens must rise from 0 to the {tokens} tokens of the row; got {bounds[:8]}")
    return bounds


def groups(bounds: list[int]) -> Iterator[list[int]]:
    """Document numbers, in groups whose lengths differ by less than a factor of two."""
    by_size: dict[int, list[int]] = {}
    for i, (a, b) in enumerate(pairwise(bounds)):
        by_size.setdefault((b - a).bit_length(), []).append(i)
    yield from by_size.values()


def unpack(row: Tensor, bounds: list[int], group: list[int]) -> tuple[Tensor, Int[Tensor, "N"]]:
    """(1 T ...) -> (N longest ...) right-padded with zeros, and the lengths."""
    pieces = [row[0, bounds[i] : bounds[i + 1]] for i in group]
    lengths = torch.tensor([len(p) for p in pieces], device=row.device)
    return torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True), lengths


def over_documents(
    f: Callable[[Tensor, Tensor], Tensor], x: Float[Tensor, "1 T I"], cu_seqlens: Int[Tensor, "N"]
) -> Float[Tensor, "1 T D"]:
    """Apply f(rows, lengths) to each document as if it were alone, and lay the outputs out as they came."""
    if x.shape[0] != 1:
        raise InputError(f"packed documents come in one row (1 T D); got {x.shape[0]} rows")
    bounds = check_cu_seqlens(cu_seqlens, x.shape[1])
    outputs: dict[int, Tensor] = {}
    for group in groups(bounds):
        rows, lengths = unpack(x, bounds, group)
        y = f(rows, lengths)
        outputs.update({i: y[n, : bounds[i + 1] - bounds[i]] for n, i in enumerate(group)})
    return torch.cat([outputs[i] for i in range(len(bounds) - 1)])[None]
