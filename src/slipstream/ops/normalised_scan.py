r"""outer_scan read as a weighted mean: values weighted by k . q, divided by the sum of the weights.

    S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T        z_t = exp(log_decay_t) z_{t-1} + k_t
    o_t = S_t^T q_t / (max(z_t . q_t, 0) + eps)

z is kept as the last column of S, written by a value that is always 1, so that all is one scan. q and k are features
whose products are weights >= 0; where random ones make the sum negative after all, it counts as 0.
log_decay is None or one per head and token (B T H): a decay per key channel would be no weight of a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.mixer import Mode
from slipstream.ops.chunks import accumulation_dtype
from slipstream.ops.outer_scan import outer_flops, outer_scan, outer_step


def normalised_scan(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H"] | None,
    state: Float[Tensor, "B H K V1"],
    lengths: Int[Tensor, "B"] | None = None,
    eps: float = 1e-6,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V1"]]:
    """Outputs in v's dtype, and the state (V1 = V + 1) after each row's last token."""
    o, S = outer_scan(q, k, _with_one(v), log_decay, state, lengths, chunk_size=chunk_size)
    return _mean(o, eps).to(v.dtype), S


def normalised_step(
    q: Float[Tensor, "B 1 H K"],
    k: Float[Tensor, "B 1 H K"],
    v: Float[Tensor, "B 1 H V"],
    log_decay: Float[Tensor, "B 1 H"] | None,
    state: Float[Tensor, "B H K V1"],
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "B 1 H V"], Float[Tensor, "B H K V1"]]:
    """One token of normalised_scan."""
    o, S = outer_step(q, k, _with_one(v), log_decay, state)
    return _mean(o, eps).to(v.dtype), S


def _with_one(v: Float[Tensor, "B T H V"]) -> Float[Tensor, "B T H V1"]:
    return F.pad(v.to(accumulation_dtype(v)), (0, 1), value=1.0)


def _mean(o: Float[Tensor, "B T H V1"], eps: float) -> Float[Tensor, "B T H V"]:
    return o[..., :-1] / (o[..., -1:].clamp(min=0) + eps)


def normalised_flops(
    T: int, B: int, H: int, K: int, V: int, mode: Mode, decays: bool = False, chunk_size: int = 64
) -> float:
    """Flops of the matrix products of T tokens, or of one (step)."""
    return outer_flops(T, B, H, K, V + 1, mode, "head" if decays else "none", chunk_size)


def reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H"] | None = None,
    state: Float[Tensor, "B H K V1"] | None = None,
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V1"]]:
    """The rule, token by token, S and z each by itself."""
    start = k.new_zeros(k.shape[0], *k.shape[2:], v.shape[3] + 1) if state is None else state
    S, z, outs = start[..., :-1], start[..., -1], []
    kept = (k.new_zeros(k.shape[:3]) if log_decay is None else log_decay)[..., None].exp()
    for t in range(q.shape[1]):
        S = kept[:, t, :, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        z = kept[:, t] * z + k[:, t]
        weight = (z * q[:, t]).sum(-1, keepdim=True).clamp(min=0)
        outs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) / (weight + eps))
    return (torch.stack(outs, 1) if outs else v), torch.cat([S, z[..., None]], -1)
