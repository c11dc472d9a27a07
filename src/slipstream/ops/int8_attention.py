r"""Causal softmax attention whose logits are products of 8-bit integers; the weights meet the values as they are.

    l_ts = scale * a_t b_s (Q_t . K_s)        Q_t = round(q_t / a_t),  K_s = round(k_s / b_s),  a and b one number a block and head,
                                              so that its largest entry becomes 127

The integers are multiplied in floating point, which gives what int8 units would, to the last bit: in float32 up to a head
width of 1040 (127 * 127 * 1040 < 2^24). On a CPU it is several times slower than attention: what the method computes, not how
fast a graphics card does it. Choosing the integers has no gradient: gradients reach the values alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from slipstream.ops.recompute import recomputed
from slipstream.ops.softmax import PLAIN, Softmax, read_by_logits, with_sinks

QUERIES, KEYS = 128, 64  # that share one factor
TOGETHER = 4 * QUERIES  # queries read at once


@torch.no_grad()
def to_int8(x: Float[Tensor, "B T H K"], together: int) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T H"]]:
    """Whole numbers from -127 to 127, and the factor of each token and head, the same for so many tokens."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    blocks = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % together)).unflatten(1, (-1, together))
    factor = blocks.abs().amax((2, 4), keepdim=True) / 127
    whole = torch.where(factor > 0, blocks / factor, 0).round()
    factor = factor[..., 0].expand(-1, -1, together, -1)
    return whole.flatten(1, 2)[:, : x.shape[1]], factor.flatten(1, 2)[:, : x.shape[1]]


def int8_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    past: Int[Tensor, "B"],
    softmax: Softmax = PLAIN,
    raised: Float[Tensor, "B T H"] | None = None,
) -> Float[Tensor, "B T H V"]:
    """k and v are laid out by position, and q_t of row b stands at past_b + t. raised: by how much all logits of a query are
    to be raised, before a cap and beside a sink, where k is not all of the key."""
    scale = softmax.scale_of(q.shape[3])
    filled = int(past.max()) + q.shape[1] if len(past) else 0
    keys, values = to_int8(k[:, :filled], KEYS), v[:, :filled]
    outputs = [q.new_zeros(len(q), 0, q.shape[2], v.shape[3])]
    for i in range(0, q.shape[1], TOGETHER):
        rows = slice(i, i + TOGETHER)
        whole, factor = to_int8(q[:, rows], QUERIES)
        seen = (
            torch.arange(filled, device=q.device) <= past[:, None, None] + torch.arange(i, i + whole.shape[1])[:, None]
        )
        until = min(filled, filled - q.shape[1] + i + TOGETHER)
        above = None if raised is None else raised[:, rows]
        part = seen[:, None, :, :until], scale, above, softmax
        outputs.append(
            recomputed(_read, (whole, factor), (keys[0][:, :until], keys[1][:, :until]), values[:, :until], *part)
        )
    return torch.cat(outputs, 1)


def _read(
    q: tuple[Tensor, Tensor],
    k: tuple[Tensor, Tensor],
    v: Float[Tensor, "B S G V"],
    seen: Bool[Tensor, "B 1 T S"],
    scale: float,
    raised: Float[Tensor, "B T H"] | None,
    softmax: Softmax,
) -> Float[Tensor, "B T H V"]:
    (q_whole, q_factor), (k_whole, k_factor) = q, k
    groups = k_whole.shape[2]
    by_group = q_whole.transpose(1, 2).unflatten(1, (groups, -1))  # B G R T K
    products = by_group @ k_whole.permute(0, 2, 3, 1)[:, :, None]
    products *= scale * q_factor.transpose(1, 2).unflatten(1, (groups, -1))[..., None]
    products *= k_factor.transpose(1, 2)[:, :, None, None]
    logits = products.flatten(1, 2)
    if raised is not None:
        logits = logits + raised.transpose(1, 2)[..., None]
    return with_sinks(*read_by_logits(softmax.capped(logits), v, seen), softmax)


def int8_attention_flops(T: int, B: int, H: int, K: int, V: int) -> float:
    """Flops of T first tokens; masked pairs count."""
    pairs = sum((min(T, i + TOGETHER) - i) * min(T, i + TOGETHER) for i in range(0, T, TOGETHER))
    return 2.0 * B * H * pairs * (K + V)


def reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G V"],
    past: Int[Tensor, "B"],
    softmax: Softmax = PLAIN,
    raised: Float[Tensor, "B T H"] | None = None,
) -> Float[Tensor, "B T H V"]:
    """The definition, query by query, in integers."""
    (B, T, H, _), per, outputs = q.shape, q.shape[2] // k.shape[2], torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    scale = softmax.scale_of(q.shape[3])
    filled = int(past.max()) + T
    for b, t, h in torch.cartesian_prod(*(torch.arange(n) for n in (B, T, H))).tolist():
        head, first = k[b, :filled, h // per], t // QUERIES * QUERIES
        a = q[b, first : first + QUERIES, h].abs().max() / 127
        factors = [
            head[s // KEYS * KEYS : s // KEYS * KEYS + KEYS].abs().max() / 127 for s in range(int(past[b]) + t + 1)
        ]
        whole = (q[b, t, h] / a).round().to(torch.int32)
        logits = torch.stack(
            [scale * a * f * (whole * (head[s] / f).round().to(torch.int32)).sum() for s, f in enumerate(factors)]
        )
        logits = softmax.capped(logits if raised is None else logits + raised[b, t, h])
        sink = logits.new_zeros(0) if softmax.sinks is None else softmax.sinks[h, None]
        weights = torch.cat([logits, sink]).softmax(0)[: len(factors)]
        outputs[b, t, h] = weights @ v[b, : len(factors), h // per]
    return outputs
