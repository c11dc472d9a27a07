r"""Chunks: matrix products inside a chunk, one state between chunks. What outer_scan and delta_scan share.

A sequence (B T H K) is cut into chunks of C tokens, laid out (N B H C K) so that each chunk is one contiguous block,
and worked through a segment of chunks at a time, which bounds memory. With G_t the log decay summed from the start of
a chunk through token t, what was written at j has decayed by exp(G_i - G_j) <= 1 when it is read at i >= j.

All such products of a chunk, P_ij = sum_d r_id exp(G_id - G_jd) k_jd, are one masked matrix product where the decay is
a scalar. Where it differs by channel, the chunk is halved again and again: any two tokens are parted by exactly one
middle m, and exp(G_i - G_m) and exp(G_m - G_j) are both <= 1, so nothing overflows, however fast the decay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.ops.valid import zero_padding

SEGMENT = 16  # chunks at once: enough to fill the matrix products, few enough to bound memory
DecayKind = Literal["none", "head", "channel"]
LogDecay = Float[Tensor, "H"] | Float[Tensor, "B T H"] | Float[Tensor, "B T H K"]  # one token: T is 1


def chunk_length(tokens: int, chunk_size: int) -> int:
    """Tokens of one chunk: a power of two, at most chunk_size, and no more than it takes to hold them all."""
    return min(1 << (max(chunk_size, 1).bit_length() - 1), 1 << (max(tokens, 1) - 1).bit_length())


def n_chunks(tokens: int, chunk_size: int) -> int:
    """How many chunks cover so many tokens."""
    return -(-tokens // chunk_length(tokens, chunk_size))


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """What states are kept in: float32, or wider when the inputs are."""
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def per_token(
    log_decay: LogDecay | None, like: Float[Tensor, "B T H K"], lengths: Int[Tensor, "B"] | None
) -> Tensor | None:
    """log_decay with a time axis, (b T H) or (B T H K), b = 1 where all rows decay alike; zero on padding."""
    if log_decay is None:
        return None
    if log_decay.ndim == 1:
        log_decay = log_decay.expand(1 if lengths is None else like.shape[0], like.shape[1], -1)
    return zero_padding(log_decay, lengths)


def over_segments(
    segment: Callable[..., tuple[Tensor, Tensor]],
    tensors: Sequence[Tensor | None],
    S: Float[Tensor, "B H K V"],
    tokens: int,
    chunk_size: int,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Run segment(*chunked tensors, S) -> (outputs (N B H C V), S) over all of time."""
    outs, C = [], chunk_length(tokens, chunk_size)
    for start in range(0, tokens, SEGMENT * C):
        pieces = [None if t is None else _cut(t[:, start : start + SEGMENT * C], C, S.dtype) for t in tensors]
        o, S = segment(*pieces, S)
        outs.append(_join(o))
    if not outs:
        return S.new_zeros(S.shape[0], 0, S.shape[1], S.shape[3]), S
    return (outs[0] if len(outs) == 1 else torch.cat(outs, 1))[:, :tokens], S


def _cut(x: Float[Tensor, "B L H *K"], C: int, dtype: torch.dtype) -> Float[Tensor, "N B H C *K"]:
    """Zeros fill the last chunk: no decay, nothing written."""
    if missing := -x.shape[1] % C:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
    x = x.unflatten(1, (-1, C)).transpose(0, 1).transpose(2, 3)
    return x.to(dtype, memory_format=torch.contiguous_format).contiguous()


def _join(o: Float[Tensor, "N B H C V"]) -> Float[Tensor, "B L H V"]:
    return o.permute(1, 0, 3, 2, 4).flatten(1, 2)


class NoDecay:
    """What decay does inside the chunks of a segment, x being (N B H C K): here, nothing."""

    def since_start(self, x: Tensor) -> Tensor:
        """Rows that read the entering state: x_t exp(G_t)."""
        return x

    def before_own(self, x: Tensor) -> Tensor:
        """Rows that read it before their own decay: x_t exp(G_{t-1})."""
        return x

    def until_end(self, x: Tensor) -> Tensor:
        """Keys as the leaving state sees them: x_t exp(G_C - G_t)."""
        return x

    def whole(self, like: Tensor) -> Tensor:
        """exp(G_C), to multiply states with: (N B H 1 1) or (N B H K 1)."""
        return like.new_ones(*like.shape[:3], 1, 1)

    def products(self, rows: Sequence[Tensor], keys: Sequence[Tensor]) -> list[list[Tensor]]:
        """For each of rows and each of keys: P (N B H C C), zero above the diagonal."""
        return [[(r @ k.mT).tril() for k in keys] for r in rows]


class Fading(ABC):
    """The same with a decay: `since` is G (N B H C K), or (N b H C 1) where all channels (b = 1: all rows) decay alike.

    `until` is G_C - G, but not by subtraction: a difference of large sums has few digits left.
    """

    def __init__(self, since: Tensor, until: Tensor) -> None:
        self.since, self.until = since, until

    def since_start(self, x: Tensor) -> Tensor:
        return x * self.since.exp()

    def before_own(self, x: Tensor) -> Tensor:
        return x * F.pad(self.since[..., :-1, :], (0, 0, 1, 0)).exp()

    def until_end(self, x: Tensor) -> Tensor:
        return x * self.until.exp()

    def whole(self, like: Tensor) -> Tensor:
        kept = self.since[..., -1:, :].exp().mT
        return kept.expand(*like.shape[:3], *kept.shape[3:])

    @abstractmethod
    def products(self, rows: Sequence[Tensor], keys: Sequence[Tensor]) -> list[list[Tensor]]: ...


class HeadDecay(Fading):
    """One number per head and token: one masked matrix product."""

    def __init__(self, log_decay: Float[Tensor, "N b H C"]) -> None:
        exact = log_decay.double().cumsum(-1)[..., None]
        G = exact.to(log_decay.dtype)
        lost = (exact - G).detach().to(G.dtype)  # by rounding G: in a difference of two, it may be all there is
        super().__init__(G, (G[..., -1:, :] - G) + (lost[..., -1:, :] - lost))
        self.between = (G - G.mT) + (lost - lost.mT)

    def products(self, rows: Sequence[Tensor], keys: Sequence[Tensor]) -> list[list[Tensor]]:
        future = torch.ones(self.between.shape[-2:], dtype=torch.bool, device=self.between.device).triu(1)
        fall = self.between.masked_fill(future, -torch.inf).exp()
        return [[(r @ k.mT) * fall for k in keys] for r in rows]


class ChannelDecay(Fading):
    """One number per head, token and key channel: halves met at their middle."""

    def __init__(self, log_decay: Float[Tensor, "N B H C K"]) -> None:
        since, until = log_decay, torch.zeros_like(log_decay)  # of blocks of one token; then of two, four, ...
        self.halves: list[tuple[int, Tensor, Tensor]] = []  # width, exp(G_i - G_m), exp(G_m - G_j)
        half = 1
        while half < log_decay.shape[-2]:
            (since_1, since_2), (until_1, until_2) = _halves(since, half), _halves(until, half)
            self.halves.append((half, since_2.exp(), until_1.exp()))
            since = torch.stack([since_1, since_2 + since_1[..., -1:, :]], -3).flatten(-4, -2)
            until = torch.stack([until_1 + since_2[..., -1:, :], until_2], -3).flatten(-4, -2)
            half *= 2
        super().__init__(since, until)

    def products(self, rows: Sequence[Tensor], keys: Sequence[Tensor]) -> list[list[Tensor]]:
        done = [[(r * k).sum(-1)[..., None, None] for k in keys] for r in rows]  # a token and itself: blocks of 1 x 1
        for half, fall, rest in self.halves:
            early = [(_halves(k, half)[0] * rest).mT for k in keys]
            late = [_halves(r, half)[1] * fall for r in rows]
            done = [[_nest(d, r @ k) for d, k in zip(row, early)] for row, r in zip(done, late)]
        return [[d.squeeze(-3) for d in row] for row in done]


Decay = NoDecay | HeadDecay | ChannelDecay


def decay_in_chunks(log_decay: Tensor | None) -> Decay:
    """By its shape: None, one per head (N b H C), or one per key channel (N B H C K)."""
    if log_decay is None:
        return NoDecay()
    if log_decay.ndim == 4:
        return HeadDecay(log_decay)
    return ChannelDecay(log_decay)


def _halves(x: Float[Tensor, "*A C K"], half: int) -> tuple[Tensor, ...]:
    """The first and the second half of every block of 2 * half tokens: (*A blocks half K) each."""
    return x.unflatten(-2, (-1, 2, half)).unbind(-3)


def _nest(diagonal: Tensor, corner: Float[Tensor, "*A M h h"]) -> Tensor:
    """Two blocks (h h) on the diagonal and the corner below become one block (2h 2h)."""
    upper, lower = diagonal.unflatten(-3, (-1, 2)).unbind(-3)
    return torch.cat([F.pad(upper, (0, corner.shape[-1])), torch.cat([corner, lower], -1)], -2)


def products_flops(C: int, K: int, kind: DecayKind) -> float:
    """Flops of one of `products`, of one chunk and head."""
    return float(C * (C - 1) * K if kind == "channel" else 2 * C * C * K)
