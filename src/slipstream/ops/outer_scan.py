r"""A matrix state that decays and takes one outer product a token: all of linear attention without erasing.

    S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

log_decay is None, one per head (H), per head and token (B T H), or per key channel (B T H K); finite and <= 0.
With a bonus u the read comes before the decay, and a token sees itself by a weight of its own (RWKV-5 and 6, Peng et
al. 2024, arXiv:2404.05892, eq. 19):

    o_t = scale * (S_{t-1} + D(u) k_t v_t^T)^T q_t

Chunked form after Yang et al. 2023 (arXiv:2312.06635, sec. 4); no normaliser: give v a column of ones to get one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.mixer import Mode
from slipstream.ops.chunks import (
    Decay,
    DecayKind,
    LogDecay,
    accumulation_dtype,
    chunk_length,
    decay_in_chunks,
    n_chunks,
    over_segments,
    per_token,
    products_flops,
)
from slipstream.ops.dispatch import operator
from slipstream.ops.valid import zero_padding


@operator("q", "k", "v", "log_decay")
def outer_scan(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: LogDecay | None = None,
    state: Float[Tensor, "B H K V"] | None = None,
    lengths: Int[Tensor, "B"] | None = None,
    scale: float = 1.0,
    chunk_size: int = 64,
    bonus: Float[Tensor, "H K"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Outputs in v's dtype, and the state after each row's last token (zeros before its first when state is None)."""
    S = fresh_state(k, v) if state is None else state.to(accumulation_dtype(v, state))
    q, k, v = (zero_padding(t, lengths) for t in (q * scale, k, v))
    segment = _segment if bonus is None else _segment_read_first
    o, S = over_segments(segment, [q, k, v, per_token(log_decay, k, lengths)], S, q.shape[1], chunk_size)
    return (o if bonus is None else o + _own(q, k, v, bonus)).to(v.dtype), S


def _segment(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, S: Tensor) -> tuple[Tensor, Tensor]:
    """One segment of chunks (N B H C .): everything at once but the state, which passes from chunk to chunk."""
    decay = decay_in_chunks(log_decay)
    ((scores,),) = decay.products([q], [k])
    entering, S = pass_on(decay, k, v, S)
    return scores @ v + decay.since_start(q) @ entering, S


def _segment_read_first(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, S: Tensor) -> tuple[Tensor, Tensor]:
    """The same, where a token reads what the one before it left: its row is computed there, and moved down by one."""
    decay = decay_in_chunks(log_decay)
    ((scores,),) = decay.products([F.pad(q[..., 1:, :], (0, 0, 0, 1))], [k])
    entering, S = pass_on(decay, k, v, S)
    return F.pad(scores[..., :-1, :], (0, 0, 1, 0)) @ v + decay.before_own(q) @ entering, S


def pass_on(decay: Decay, k: Tensor, v: Tensor, S: Tensor) -> tuple[Float[Tensor, "N B H K V"], Tensor]:
    """The states that enter each chunk, and the one that leaves the last."""
    entering = []
    for written, kept in zip((decay.until_end(k).mT @ v).unbind(0), decay.whole(v).unbind(0)):
        entering.append(S)
        S = torch.addcmul(written, kept, S)
    return torch.stack(entering), S


def _own(q: Tensor, k: Tensor, v: Tensor, bonus: Float[Tensor, "H K"]) -> Float[Tensor, "*A H V"]:
    """What a token reads of itself."""
    return (q * bonus * k).sum(-1, keepdim=True) * v


@operator()
def outer_step(
    q: Float[Tensor, "B 1 H K"],
    k: Float[Tensor, "B 1 H K"],
    v: Float[Tensor, "B 1 H V"],
    log_decay: LogDecay | None,
    state: Float[Tensor, "B H K V"],
    scale: float = 1.0,
    bonus: Float[Tensor, "H K"] | None = None,
) -> tuple[Float[Tensor, "B 1 H V"], Float[Tensor, "B H K V"]]:
    """One token of outer_scan, by the rule itself."""
    row, key, value = (t[:, 0].to(state.dtype) for t in (q * scale, k, v))
    S = torch.addcmul(decayed(state, log_decay), key[..., :, None], value[..., None, :])
    o = row[..., None, :] @ (S if bonus is None else state)
    o = o.squeeze(-2) if bonus is None else o.squeeze(-2) + _own(row, key, value, bonus)
    return o[:, None].to(v.dtype), S


def decayed(S: Float[Tensor, "B H K V"], log_decay: LogDecay | None) -> Float[Tensor, "B H K V"]:
    """The state after one token's decay."""
    if log_decay is None:
        return S
    kept = log_decay.to(S.dtype).exp()
    if kept.ndim == 1:
        return kept[:, None, None] * S
    return (kept[:, 0, :, :, None] if kept.ndim == 4 else kept[:, 0, :, None, None]) * S


def fresh_state(k: Float[Tensor, "B T H K"], v: Float[Tensor, "B T H V"]) -> Float[Tensor, "B H K V"]:
    """Zeros, in float32 at least."""
    return v.new_zeros(k.shape[0], *k.shape[2:], v.shape[3], dtype=accumulation_dtype(v))


def outer_flops(
    T: int, B: int, H: int, K: int, V: int, mode: Mode, kind: DecayKind = "none", chunk_size: int = 64
) -> float:
    """Flops of the matrix products of T tokens, or of one (step). kind: what log_decay is."""
    if mode == "step":
        return 2.0 * B * H * K * V
    C = chunk_length(T, chunk_size)
    return n_chunks(T, chunk_size) * B * H * (products_flops(C, K, kind) + 2.0 * C * C * V + 4.0 * C * K * V)


def reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: LogDecay | None = None,
    state: Float[Tensor, "B H K V"] | None = None,
    scale: float = 1.0,
    bonus: Float[Tensor, "H K"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """The rule, token by token."""
    S, outs = (fresh_state(k, v) if state is None else state), []
    for t in range(q.shape[1]):
        before, kv = S, torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        if log_decay is not None:
            w = log_decay if log_decay.ndim == 1 else log_decay[:, t]
            S = S * (w[..., None] if log_decay.ndim == 4 else w[..., None, None]).exp()
        S = S + kv
        read = S if bonus is None else before + bonus[..., None] * kv
        outs.append(scale * torch.einsum("bhkv,bhk->bhv", read, q[:, t]))
    return (torch.stack(outs, 1) if outs else v), S
