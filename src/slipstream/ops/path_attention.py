r"""Softmax attention along paths: a key is turned by every token between itself and the query, each in a way of its own.

    o_t = sum_{s<=t} softmax_s(scale * q_t^T H_t ... H_{s+1} k_s + key_bias_s) v_s        H_i = I - beta_i w_i w_i^T

For a chunk of C tokens with rows W, the system (I + strictly lower part of beta W W^T) [Y X] = [beta W, strictly lower
part of beta W K^T] gives all it needs (Yang et al. 2025, arXiv:2505.16381): queries as keys before the chunk meet them,
Q - tril(Q W^T) Y; logits inside, tril(Q K^T) - tril(Q W^T) X; keys as the end of the chunk leaves them, K - X^T W; and the
whole chunk's turn, P = I - W^T Y. A chunk's queries are carried back over the pieces before it, meeting the keys of each:
chunks, joined two by two as they become many. That is C x T weights at once, which are made again for the gradient. Work
grows as T^2, memory as T log T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.ops.chunks import accumulation_dtype
from slipstream.ops.pieces import Pieces, joins, met
from slipstream.ops.recompute import recomputed
from slipstream.ops.valid import valid_mask, zero_padding


class Past(NamedTuple):
    """What came before this call, heads first: keys as its end left them, values, biases, and which of them are there."""

    k: Float[Tensor, "B G S K"]
    v: Float[Tensor, "B G S V"]
    bias: Float[Tensor, "B G R S"] | None
    seen: Tensor


def path_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    w: Float[Tensor, "B T G K"],
    beta: Float[Tensor, "B T G"],
    past_k: Float[Tensor, "B S G K"],
    past_v: Float[Tensor, "B S G V"],
    past: Int[Tensor, "B"],
    lengths: Int[Tensor, "B"] | None = None,
    scale: float = 1.0,
    key_bias: Float[Tensor, "B N H"] | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B T G K"], Float[Tensor, "B S G K"]]:
    """Outputs, the new keys and the past ones, both as the last token leaves them. Stable for unit w and 0 <= beta <= 2.

    Row b has seen past_b tokens, whose keys (so left by the call before) and values stand first in past_k and past_v.
    key_bias: of past and new tokens, laid out by position; it may be a long running sum in float64.
    """
    dtype, R, filled = accumulation_dtype(past_k), q.shape[2] // k.shape[2], int(past.max()) if len(past) else 0
    k, v, w, beta = (zero_padding(t, lengths).to(dtype).transpose(1, 2) for t in (k, v, w, beta))
    q = (q * scale).to(dtype).unflatten(2, (-1, R)).permute(0, 2, 3, 1, 4)
    old_k, old_v = (t[:, :filled].to(dtype).transpose(1, 2) for t in (past_k, past_v))
    old_bias, new_bias = (None, None) if key_bias is None else _split(key_bias, past, filled, k.shape[2], R)
    before = Past(old_k, old_v, old_bias, valid_mask(past, filled)[:, None, None, None])
    outs: list[Tensor] = []
    turns = Pieces(_join)
    for i in range(0, q.shape[3], chunk_size):
        own = slice(i, i + chunk_size)
        chunk = k[:, :, own], w[:, :, own], beta[:, :, own]
        bias = None if new_bias is None else new_bias[..., : i + chunk_size]
        outs.append(recomputed(_read, q[..., own, :], *chunk, v[:, :, : i + chunk_size], bias, tuple(turns), before))
        turns.append(recomputed(_turn, *chunk))
    o = torch.cat([q.new_zeros(*q.shape[:3], 0, v.shape[3]), *outs], 3).permute(0, 3, 1, 2, 4).flatten(2, 3)
    new_k, old_k = _at_the_end(turns, k[:, :, :0], old_k)
    past_k = torch.cat([old_k.transpose(1, 2).to(past_k.dtype), past_k[:, filled:]], 1)
    return o.to(past_v.dtype), new_k.transpose(1, 2), past_k


def _split(key_bias: Tensor, past: Tensor, filled: int, tokens: int, R: int) -> list[Float[Tensor, "B G R S"]]:
    """Biases of the past, and of the new tokens, which stand behind each row's own past."""
    at = (past[:, None] + torch.arange(tokens, device=past.device))[..., None].expand(-1, -1, key_bias.shape[2])
    return [b.unflatten(2, (-1, R)).permute(0, 2, 3, 1) for b in (key_bias[:, :filled], key_bias.gather(1, at))]


def _solve(k: Tensor, w: Tensor, beta: Tensor) -> list[Tensor]:
    """Y (B G C K) and X (B G C C)."""
    strong = beta[..., None] * w
    both = torch.cat([strong, (strong @ k.mT).tril(-1)], -1)
    solved = torch.linalg.solve_triangular(strong @ w.mT, both, upper=False, unitriangular=True)
    return list(solved.split([w.shape[-1], w.shape[-2]], -1))


def _turn(k: Tensor, w: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """A chunk's keys as its end leaves them (B G C K), and its turn P (B G K K)."""
    Y, X = _solve(k, w, beta)
    return k - X.mT @ w, torch.eye(w.shape[-1], dtype=w.dtype, device=w.device) - w.mT @ Y


def _join(earlier: tuple[Tensor, Tensor], later: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and turn of two neighbours as one."""
    return torch.cat([earlier[0] @ later[1].mT, later[0]], 2), later[1] @ earlier[1]


def _read(
    q: Float[Tensor, "B G R C K"],
    k: Float[Tensor, "B G C K"],
    w: Float[Tensor, "B G C K"],
    beta: Float[Tensor, "B G C"],
    v: Float[Tensor, "B G n V"],
    bias: Float[Tensor, "B G R n"] | None,
    turns: tuple[tuple[Tensor, Tensor], ...],
    before: Past,
) -> Float[Tensor, "B G R C V"]:
    """Outputs of one chunk, whose own values stand last in v."""
    Y, X = (t[:, :, None] for t in _solve(k, w, beta))
    own = (q @ w[:, :, None].mT).tril()
    future = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool, device=k.device).triu(1)
    logits = [(q @ k[:, :, None].mT - own @ X).masked_fill(future, -torch.inf)]
    q = q - own @ Y
    for key, turn in reversed(turns):
        logits.append(q @ key[:, :, None].mT)
        q = q @ turn[:, :, None]
    logits.append((q @ before.k[:, :, None].mT).masked_fill(~before.seen, -torch.inf))
    total = torch.cat(logits[::-1], -1)
    if bias is not None and before.bias is not None:
        first = bias[..., -k.shape[2], None]  # only differences count, and long sums have few digits
        total = total + torch.cat([before.bias - first, bias - first], -1)[..., None, :].to(total.dtype)
    old, new = total.softmax(-1).split([before.k.shape[2], v.shape[2]], -1)
    return old @ before.v[:, :, None] + new @ v[:, :, None]


def _at_the_end(turns: Pieces[tuple[Tensor, Tensor]], none: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """New keys and old ones, turned by all pieces after them."""
    keys: list[Tensor] = []
    rest = torch.eye(old.shape[-1], dtype=old.dtype, device=old.device)
    for key, turn in reversed(list(turns)):
        keys.append(key @ rest)
        rest = turn.mT @ rest
    return torch.cat([none, *keys[::-1]], 2), old @ rest


def path_step(
    w: Float[Tensor, "B 1 G K"], beta: Float[Tensor, "B 1 G"], past_k: Float[Tensor, "B S G K"]
) -> Float[Tensor, "B S G K"]:
    """Past keys as one more token leaves them; what it then attends to is ordinary attention."""
    w, beta = w.to(past_k.dtype), beta.to(past_k.dtype)
    return past_k - (beta * (past_k * w).sum(-1))[..., None] * w


def path_flops(T: int, B: int, H: int, G: int, K: int, V: int, chunk_size: int = 64) -> float:
    """Flops of path_attention's matrix products over T first tokens (a part of a chunk counted as a part of its products).

    The triangular solves count nothing.
    """
    C, N = min(chunk_size, max(T, 1)), -(-T // chunk_size)
    pairs = (T * T + T * C) / 2
    inside = H * T * (2 * C * K + C * (C + K)) + G * T * (
        4 * C * K
    )  # queries with w, keys, X, Y; w with k and w, twice
    read = H * (pairs * (K + V) - T * C * K) + H * met(N) * C * K * K
    turned = G * T * (C * K + K * K)
    joined = G * sum(n * (side * C * K * K + K**3) for side, n in joins(N))
    left = G * sum(min(T, C << bit) * K * K + K**3 for bit in range(N.bit_length()) if N >> bit & 1)
    return 2.0 * B * (inside + read + turned + joined + left)


def reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    w: Float[Tensor, "B T G K"],
    beta: Float[Tensor, "B T G"],
    key_bias: Float[Tensor, "B T H"] | None = None,
    scale: float = 1.0,
) -> Float[Tensor, "B T H V"]:
    """The definition: at every token all keys before it are turned, then it attends to them and itself."""
    R, outs, keys = q.shape[2] // k.shape[2], [], k[:, :0]
    for t in range(q.shape[1]):
        found = torch.einsum("bsgk,bgk->bsg", keys, w[:, t])
        keys = keys - torch.einsum("bg,bsg,bgk->bsgk", beta[:, t], found, w[:, t])
        keys = torch.cat([keys, k[:, t : t + 1]], 1)
        logits = scale * torch.einsum("bhk,bshk->bhs", q[:, t], keys.repeat_interleave(R, 2))
        if key_bias is not None:
            logits = logits + key_bias[:, : t + 1].mT
        outs.append(torch.einsum("bhs,bshv->bhv", logits.softmax(-1), v[:, : t + 1].repeat_interleave(R, 2)))
    return torch.stack(outs, 1) if outs else q.new_zeros(*q.shape[:3], v.shape[3])
