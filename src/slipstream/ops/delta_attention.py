r"""The delta rule of softmax attention: from every new value goes first what attention finds under its own key.

    u_t = v_t - beta_t sum_{j<t} softmax_j(scale * w_t . k_j) u_j

What attention then reads is u, not v. In a chunk of C tokens the u before it are known, and its own solve a triangular
system (I + beta P) u = v - beta P' u', P and P' the chunk's weights of its own and of earlier tokens. Chunks follow one
another; each holds C x T weights, and makes them again for its gradient. Work grows as T^2, memory as T log T.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.mixer import Mode
from slipstream.ops.chunks import accumulation_dtype
from slipstream.ops.pieces import Pieces
from slipstream.ops.recompute import recomputed
from slipstream.ops.valid import valid_mask, zero_padding


def delta_values(
    w: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    past_k: Float[Tensor, "B S H K"],
    past_u: Float[Tensor, "B S H V"],
    past: Int[Tensor, "B"],
    lengths: Int[Tensor, "B"] | None = None,
    scale: float = 1.0,
    chunk_size: int = 64,
) -> Float[Tensor, "B T H V"]:
    """u of new tokens. Row b has seen past_b of them, whose k and u stand first in past_k and past_u; |beta| <= 1 is stable.

    lengths: of right-padded rows; u is zero on padding.
    """
    dtype, filled = accumulation_dtype(v), past_k.shape[1]
    if not torch.compiler.is_compiling():
        filled = int(past.max()) if len(past) else 0  # what is not filled need not be read
    w, k, v, beta = (zero_padding(t, lengths).to(dtype).transpose(1, 2) for t in (w * scale, k, v, beta))
    old_k = past_k[:, :filled].to(dtype).transpose(1, 2)
    us, old_u = Pieces(_beside), past_u[:, :filled].to(dtype).transpose(1, 2)
    seen = valid_mask(past, filled)[:, None, None]
    for i in range(0, w.shape[2], chunk_size):
        own = slice(i, i + chunk_size)
        keys = old_k, k[:, :, : i + chunk_size]
        known = old_u, *us
        us.append(recomputed(_chunk, w[:, :, own], keys, v[:, :, own], beta[:, :, own, None], known, seen))
    return torch.cat([v[:, :, :0], *us], 2).transpose(1, 2).to(past_u.dtype)


def _beside(earlier: Tensor, later: Tensor) -> Tensor:
    return torch.cat([earlier, later], 2)


def _chunk(
    w: Tensor, keys: tuple[Tensor, Tensor], v: Tensor, beta: Tensor, us: tuple[Tensor, ...], seen: Tensor
) -> Tensor:
    """u (B H C V) of one chunk, whose own keys stand last."""
    before, tokens = torch.cat(us, 2), w.shape[2]
    rows = torch.arange(keys[1].shape[2], device=w.device)
    earlier = (rows < rows[-tokens:, None]).expand(seen.shape[0], 1, -1, -1)
    mask = torch.cat([seen.expand(-1, -1, tokens, -1), earlier], -1)
    logits = torch.cat([w @ key.mT for key in keys], -1).masked_fill(~mask, torch.finfo(w.dtype).min)
    weights = beta * logits.softmax(-1).masked_fill(~mask, 0)  # a first token finds nothing
    known, own = weights.split([before.shape[2], tokens], -1)
    return torch.linalg.solve_triangular(own, v - known @ before, upper=False, unitriangular=True)


def delta_values_flops(T: int, B: int, H: int, K: int, V: int, mode: Mode, chunk_size: int = 64) -> float:
    """Flops of the products with keys and with u, of T tokens or of one after T; the triangular solve counts nothing."""
    if mode == "step":
        return 2.0 * B * H * (K * (T + 1) + V * T)
    full, rest = divmod(T, chunk_size)
    before = chunk_size**2 * full * (full - 1) // 2 + rest * full * chunk_size
    own = full * chunk_size**2 + rest**2
    return 2.0 * B * H * (K * (before + own) + V * before)


def reference(
    w: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    scale: float = 1.0,
) -> Float[Tensor, "B T H V"]:
    """The definition, token by token, from the first."""
    us: list[Tensor] = []
    for t in range(v.shape[1]):
        u = v[:, t]
        if us:
            weights = (scale * torch.einsum("bhk,bshk->bhs", w[:, t], k[:, :t])).softmax(-1)
            u = u - beta[:, t, :, None] * torch.einsum("bhs,bshv->bhv", weights, torch.stack(us, 1))
        us.append(u)
    return torch.stack(us, 1) if us else v
