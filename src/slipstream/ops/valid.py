"""Ragged rows: which tokens of right-padded rows are real, and what padding must become so that no state sees it."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def valid_mask(lengths: Int[Tensor, "B"], tokens: int) -> Bool[Tensor, "B T"]:
    """True where a token is real."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]


def real_tokens(x: Tensor, lengths: Int[Tensor, "B"] | None) -> Bool[Tensor, "B T"]:
    """The same of x (B T ...), all of whose tokens are real when no row is padded."""
    return x.new_ones(x.shape[:2], dtype=torch.bool) if lengths is None else valid_mask(lengths, x.shape[1])


def zero_padding(x: Tensor, lengths: Int[Tensor, "B"] | None) -> Tensor:
    """(B T ...) with padding set to zero (whatever it held, NaN included); unchanged when no row is padded."""
    if lengths is None:
        return x
    mask = valid_mask(lengths, x.shape[1])
    return torch.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, x.new_zeros(()))


def last_tokens(x: Tensor, n: int, lengths: Int[Tensor, "B"] | None) -> Tensor:
    """The n tokens before each row's end: x (B P+T ...) holds P >= n tokens of the past, then T of which lengths are real."""
    if lengths is None or n == 0:
        return x[:, x.shape[1] - n :]
    index = lengths[:, None] + torch.arange(n, device=x.device)
    return torch.gather(x, 1, index.reshape(*index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
