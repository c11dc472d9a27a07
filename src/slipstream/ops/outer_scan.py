r"""A matrix state that decays and takes one outer product a token: all of linear attention without erasing.

    S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

log_decay is None, one per head (H), per head and token (B T H), or per key channel (B T H K); finite and <= 0.
Chunked form after Yang et al. 2023 (arXiv:2312.06635, sec. 4); no normaliser: give v a column of ones to get one.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.mixer import Mode
from slipstream.ops.chunks import (
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
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Outputs in v's dtype, and the state after each row's last token (zeros before its first when state is None)."""
    S = fresh_state(k, v) if state is None else state.to(accumulation_dtype(v, state))
    q, k, v = (zero_padding(t, lengths) for t in (q * scale, k, v))
    o, S = over_segments(_segment, [q, k, v, per_token(log_decay, k, lengths)], S, q.shape[1], chunk_size)
    return o.to(v.dtype), S


def _segment(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, S: Tensor) -> tuple[Tensor, Tensor]:
    """One segment of chunks (N B H C .): everything at once but the state, which passes from chunk to chunk."""
    decay = decay_in_chunks(log_decay)
    ((scores,),) = decay.products([q], [k])
    entering = []
    for written, kept in zip((decay.until_end(k).mT @ v).unbind(0), decay.whole(v).unbind(0)):
        entering.append(S)
        S = torch.addcmul(written, kept, S)
    return scores @ v + decay.since_start(q) @ torch.stack(entering), S


def outer_step(
    q: Float[Tensor, "B 1 H K"],
    k: Float[Tensor, "B 1 H K"],
    v: Float[Tensor, "B 1 H V"],
    log_decay: LogDecay | None,
    state: Float[Tensor, "B H K V"],
    scale: float = 1.0,
) -> tuple[Float[Tensor, "B 1 H V"], Float[Tensor, "B H K V"]]:
    """One token of outer_scan, by the rule itself."""
    row, key, value = (t[:, 0].to(state.dtype) for t in (q, k, v))
    S = torch.addcmul(decayed(state, log_decay), key[..., :, None], value[..., None, :])
    o = (scale * row)[..., None, :] @ S
    return o.transpose(1, 2).to(v.dtype), S


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
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """The rule, token by token."""
    S, outs = (fresh_state(k, v) if state is None else state), []
    for t in range(q.shape[1]):
        if log_decay is not None:
            w = log_decay if log_decay.ndim == 1 else log_decay[:, t]
            S = S * (w[..., None] if log_decay.ndim == 4 else w[..., None, None]).exp()
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outs.append(scale * torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return (torch.stack(outs, 1) if outs else v), S
