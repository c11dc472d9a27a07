r"""Attention over a fixed number of slots: two decaying memories that are written alike, read one after the other.

    K_t = D(a_t) K_{t-1} + w_t k_t^T        V_t = D(a_t) V_{t-1} + w_t v_t^T        o_t = V_t^T softmax(scale * K_t q_t)

a_t = exp(log_decay_t) and w_t are vectors with a number for every slot M; log_decay is finite and <= 0 (Zhang et al.
2024, arXiv:2409.07146, sec. 3). The second read is outer_scan's. In the first the decay is on what comes out: with the
halves of chunks.ChannelDecay, every product of a late and an early token is faded from both sides of their middle.
K is kept (B H K M), V as (B H M V).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.mixer import Mode
from slipstream.ops.chunks import (
    ChannelDecay,
    accumulation_dtype,
    chunk_length,
    n_chunks,
    over_segments,
    per_token,
    products_flops,
)
from slipstream.ops.dispatch import operator
from slipstream.ops.outer_scan import fresh_state, outer_flops, outer_scan, outer_step, pass_on
from slipstream.ops.valid import zero_padding

Slots = tuple[Float[Tensor, "B H K M"], Float[Tensor, "B H M V"]]


@operator("q", "k", "v", "write", "log_decay")
def slot_scan(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    write: Float[Tensor, "B T H M"],
    log_decay: Float[Tensor, "B T H M"],
    state: Slots | None = None,
    lengths: Int[Tensor, "B"] | None = None,
    scale: float = 1.0,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T H V"], Slots]:
    """Outputs in v's dtype, and both memories after each row's last token (zeros before its first when state is None)."""
    K, V = state or (fresh_state(k, write), fresh_state(write, v))
    line = [zero_padding(t, lengths) for t in (q * scale, k, write)]
    decay = per_token(log_decay, write, lengths)
    scores, K = over_segments(_match, [*line, decay], K.to(accumulation_dtype(v, K)), q.shape[1], chunk_size)
    o, V = outer_scan(scores.softmax(-1), line[2], v, decay, V, lengths, chunk_size=chunk_size)
    return o.to(v.dtype), (K, V)


def _match(q: Tensor, k: Tensor, write: Tensor, log_decay: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    """One segment of chunks (N B H C .): how well each query matches each slot, (N B H C M)."""
    decay = ChannelDecay(log_decay)
    entering, K_transposed = pass_on(decay, write, k, K.mT)
    scores = decay.since_start(q @ entering.mT) + (q * k).sum(-1, keepdim=True) * write
    for half, fall, rest in decay.halves:
        late, early = (t.unflatten(-2, (-1, 2, half)) for t in (q, k))
        pairs = late[..., 1, :, :] @ early[..., 0, :, :].mT
        written = write.unflatten(-2, (-1, 2, half))[..., 0, :, :]
        scores = scores + F.pad(fall * (pairs @ (rest * written)), (0, 0, half, 0)).flatten(-3, -2)
    return scores, K_transposed.mT


def slot_step(
    q: Float[Tensor, "B 1 H K"],
    k: Float[Tensor, "B 1 H K"],
    v: Float[Tensor, "B 1 H V"],
    write: Float[Tensor, "B 1 H M"],
    log_decay: Float[Tensor, "B 1 H M"],
    state: Slots,
    scale: float = 1.0,
) -> tuple[Float[Tensor, "B 1 H V"], Slots]:
    """One token of slot_scan, by the rule itself."""
    row, key, new, fade = (t[:, 0, :].to(state[0].dtype) for t in (q * scale, k, write, log_decay))
    K = torch.addcmul(state[0] * fade.exp()[:, :, None], key[..., :, None], new[..., None, :])
    scores = (row[..., None, :] @ K).squeeze(-2)[:, None]
    o, V = outer_step(scores.softmax(-1), write, v, log_decay, state[1])
    return o.to(v.dtype), (K, V)


def slot_flops(T: int, B: int, H: int, K: int, V: int, M: int, mode: Mode, chunk_size: int = 64) -> float:
    """Flops of the matrix products of T tokens, or of one (step)."""
    read = outer_flops(T, B, H, M, V, mode, "channel", chunk_size)
    if mode == "step":
        return read + 2.0 * B * H * K * M
    C = chunk_length(T, chunk_size)
    pairs = products_flops(C, K, "channel") + products_flops(C, M, "channel")
    return read + n_chunks(T, chunk_size) * B * H * (pairs + 4.0 * C * K * M)


def reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    write: Float[Tensor, "B T H M"],
    log_decay: Float[Tensor, "B T H M"],
    state: Slots | None = None,
    scale: float = 1.0,
) -> tuple[Float[Tensor, "B T H V"], Slots]:
    """The rule, token by token."""
    (K, V), outs = state or (fresh_state(k, write), fresh_state(write, v)), []
    for t in range(q.shape[1]):
        a, w = log_decay[:, t].exp(), write[:, t]
        K = K * a[:, :, None] + torch.einsum("bhk,bhm->bhkm", k[:, t], w)
        V = V * a[..., None] + torch.einsum("bhm,bhv->bhmv", w, v[:, t])
        weights = (scale * torch.einsum("bhkm,bhk->bhm", K, q[:, t])).softmax(-1)
        outs.append(torch.einsum("bhmv,bhm->bhv", V, weights))
    return (torch.stack(outs, 1) if outs else v), (K, V)
