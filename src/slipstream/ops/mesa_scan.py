r"""Ridge regression at every token: a matrix state read through the inverse of the keys' own, by conjugate gradients.

    R_t = exp(log_decay_t) R_{t-1} + beta_t k_t k_t^T        G_t = exp(log_decay_t) G_{t-1} + beta_t k_t v_t^T

    o_t = G_t^T x_t        (R_t + D(lam)) x_t = q_t  by n_steps of conjugate gradients from x = 0

After von Oswald et al. 2025 (arXiv:2506.05233). The number of steps is part of the definition, and so all forms agree to the
last digit, converged or not. No R_t is made but at the chunks' edges: each step multiplies the directions of all tokens by
their own R_t in the chunked form of linear attention. State: R and G side by side, (B H K K+V).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.mixer import Mode
from slipstream.ops.chunks import accumulation_dtype, chunk_length, decay_in_chunks, n_chunks, over_segments
from slipstream.ops.dispatch import operator
from slipstream.ops.recompute import recomputed
from slipstream.ops.valid import zero_padding

EPS = 1e-5  # keeps steps after convergence at rest; the authors' value


@operator("q", "k", "v", "beta", "log_decay")
def mesa_scan(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    log_decay: Float[Tensor, "B T H"],
    lam: Float[Tensor, "H K"],
    state: Float[Tensor, "B H K N"] | None = None,
    lengths: Int[Tensor, "B"] | None = None,
    n_steps: int = 30,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K N"]]:
    """Outputs in v's dtype, and the state after each row's last token. lam > 0."""
    dtype = accumulation_dtype(v, *([] if state is None else [state]))
    S = v.new_zeros(k.shape[0], *k.shape[2:], k.shape[3] + v.shape[3]) if state is None else state
    line = [zero_padding(t, lengths) for t in (q, k, v, beta, log_decay)]
    segment = partial(recomputed, partial(_segment, n_steps=n_steps), lam.to(dtype)[:, None])
    xo, S = over_segments(segment, line, S.to(dtype), q.shape[1], chunk_size)
    return xo[..., k.shape[3] :].to(v.dtype), S


def _segment(
    lam: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, S: Tensor, n_steps: int
) -> tuple[Tensor, Tensor]:
    """One segment of chunks (N B H C .), as in outer_scan, but for rows not known beforehand: x and o, side by side."""
    decay, one = decay_in_chunks(log_decay), torch.ones_like(beta)[..., None]
    ((fall,),), since = decay.products([one], [one]), decay.since_start(one)  # the same at every step
    both, strong = torch.cat([k, v], -1), beta[..., None] * k
    entering = []
    for written, kept in zip((decay.until_end(strong).mT @ both).unbind(0), decay.whole(both).unbind(0)):
        entering.append(S)
        S = torch.addcmul(written, kept, S)
    past_R, past_G = torch.stack(entering).split([k.shape[-1], v.shape[-1]], -1)

    def read(rows: Tensor, values: Tensor, past: Tensor) -> Tensor:
        return (rows @ strong.mT * fall) @ values + since * rows @ past

    x = conjugate_gradients(lambda p: read(p, k, past_R) + lam * p, q, n_steps)
    return torch.cat([x, read(x, v, past_G)], -1), S


def conjugate_gradients(times: Callable[[Tensor], Tensor], b: Float[Tensor, "*A K"], n_steps: int) -> Tensor:
    """x with times(x) near b, for symmetric positive times, after n_steps from zero."""
    x, r, p = torch.zeros_like(b), b, b
    size = (r * r).sum(-1, keepdim=True)
    for _ in range(n_steps):
        turned = times(p)
        length = size / ((p * turned).sum(-1, keepdim=True) + EPS)
        x, r = x + length * p, r - length * turned
        before, size = size, (r * r).sum(-1, keepdim=True)
        p = r + size / (before + EPS) * p
    return x


def mesa_step(
    q: Float[Tensor, "B 1 H K"],
    k: Float[Tensor, "B 1 H K"],
    v: Float[Tensor, "B 1 H V"],
    beta: Float[Tensor, "B 1 H"],
    log_decay: Float[Tensor, "B 1 H"],
    lam: Float[Tensor, "H K"],
    state: Float[Tensor, "B H K N"],
    n_steps: int = 30,
) -> tuple[Float[Tensor, "B 1 H V"], Float[Tensor, "B H K N"]]:
    """One token of mesa_scan, by the rule itself."""
    kept, key, lam = (t.to(state.dtype) for t in (log_decay[:, 0, :, None, None].exp(), k[:, 0], lam))
    both = torch.cat([key, v[:, 0].to(state.dtype)], -1)
    S = torch.addcmul(kept * state, beta[:, 0, :, None, None].to(state.dtype) * key[..., :, None], both[..., None, :])
    R, G = S.split([k.shape[3], v.shape[3]], -1)
    row = q.transpose(1, 2).to(state.dtype)
    x = conjugate_gradients(lambda p: p @ R + lam[:, None] * p, row, n_steps)
    return (x @ G).transpose(1, 2).to(v.dtype), S


def mesa_flops(T: int, B: int, H: int, K: int, V: int, mode: Mode, n_steps: int = 30, chunk_size: int = 64) -> float:
    """Flops of the matrix products of T tokens, or of one (step)."""
    if mode == "step":
        return 2.0 * B * H * K * (n_steps * K + V)
    C = chunk_length(T, chunk_size)
    read_R, read_G = (2.0 * C * C * (K + n) + 2.0 * C * K * n for n in (K, V))
    return n_chunks(T, chunk_size) * B * H * (2.0 * C * (C + K * (K + V)) + n_steps * read_R + read_G)


def reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    log_decay: Float[Tensor, "B T H"],
    lam: Float[Tensor, "H K"],
    n_steps: int = 30,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K K"], Float[Tensor, "B H K V"]]:
    """The rule, token by token, from nothing: outputs, R and G."""
    R, G, outs = k.new_zeros(*k[:, 0].shape, k.shape[3]), v.new_zeros(*k[:, 0].shape, v.shape[3]), []
    for t in range(q.shape[1]):
        kept, strong = log_decay[:, t, :, None, None].exp(), beta[:, t, :, None] * k[:, t]
        R = kept * R + torch.einsum("bhi,bhj->bhij", strong, k[:, t])
        G = kept * G + torch.einsum("bhk,bhv->bhkv", strong, v[:, t])
        A = R + torch.diag_embed(lam)
        x = conjugate_gradients(lambda p, A=A: torch.einsum("bhij,bhj->bhi", A, p), q[:, t], n_steps)
        outs.append(torch.einsum("bhkv,bhk->bhv", G, x))
    return (torch.stack(outs, 1) if outs else v), R, G
