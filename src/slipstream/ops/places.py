"""Chunks that begin at fixed positions of every row: rows whose past ends inside a chunk, moved so that borders meet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Int, Shaped
from torch import Tensor


def cut_out(x: Shaped[Tensor, "B T *R"], start: Int[Tensor, "B"], tokens: int) -> Shaped[Tensor, "B L *R"]:
    """So many tokens of each row from its own place `start` on; zeros before the row (start < 0) and behind it."""
    place = start[:, None] + torch.arange(tokens, device=x.device)
    outside = (place < 0) | (place >= x.shape[1])
    line = F.pad(x, (0, 0) * (x.ndim - 2) + (0, 1))  # the token behind the row is zero, and stands for all outside
    index = place.masked_fill(outside, x.shape[1])
    return line.gather(1, index.reshape(*index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
