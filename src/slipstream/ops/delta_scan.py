r"""A matrix state whose every write first erases: the delta rule, and the general diagonal-plus-low-rank transition.

    delta_scan    S_t = (I - beta_t k_t k_t^T) D(w_t) S_{t-1} + beta_t k_t v_t^T            o_t = scale * S_t^T q_t
    dplr_scan     S_t = D(w_t) S_{t-1} + a_t b_t^T S' + k_t v_t^T     S' = D(w_t) S_{t-1} or S_{t-1}, by `erase`

w = exp(log_decay) is none, one per head and token (B T H), or per key channel (B T H K); log_decay is finite and <= 0.
In a chunk that S_0 enters, the erased values u = b^T S' solve a triangular system (the WY form: Yang et al. 2024,
arXiv:2406.06484, eq. 8-11; with decay arXiv:2412.06464, sec. 3.3), here split as u = fresh + back S_0, so that only two
products a chunk wait for the state. Solved by substitution: a Neumann product would lose all digits in float32.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.errors import InputError
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
from slipstream.ops.outer_scan import decayed, fresh_state
from slipstream.ops.valid import zero_padding


@operator("q", "k", "v", "beta", "log_decay")
def delta_scan(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    log_decay: LogDecay | None = None,
    state: Float[Tensor, "B H K V"] | None = None,
    lengths: Int[Tensor, "B"] | None = None,
    scale: float = 1.0,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Outputs in v's dtype, and the state after each row's last token. Stable for unit k and 0 <= beta <= 2."""
    S = fresh_state(k, v) if state is None else state.to(accumulation_dtype(v, state))
    line = [zero_padding(t, lengths) for t in (q * scale, k, v, beta)]
    o, S = over_segments(_delta_segment, [*line, per_token(log_decay, k, lengths)], S, q.shape[1], chunk_size)
    return o.to(v.dtype), S


@operator("q", "k", "v", "read", "write", "log_decay")
def dplr_scan(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    read: Float[Tensor, "B T H K"],
    write: Float[Tensor, "B T H K"],
    log_decay: LogDecay | None = None,
    state: Float[Tensor, "B H K V"] | None = None,
    lengths: Int[Tensor, "B"] | None = None,
    scale: float = 1.0,
    chunk_size: int = 64,
    erase: str = "decayed",
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """read is b, write is a; erase says which state b reads. Stable while D(w) + a b^T does not grow."""
    segment = partial(_dplr_segment, erase=known(erase))
    S = fresh_state(k, v) if state is None else state.to(accumulation_dtype(v, state))
    line = [zero_padding(t, lengths) for t in (q * scale, k, v, read, write)]
    o, S = over_segments(segment, [*line, per_token(log_decay, k, lengths)], S, q.shape[1], chunk_size)
    return o.to(v.dtype), S


def _delta_segment(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, S: Tensor):
    """One segment of chunks (N B H C .); the erased value and the new one share the key: u = beta (v - k^T S')."""
    decay = decay_in_chunks(log_decay)
    erase = beta[..., None] * k
    (system,), (scores,) = decay.products([erase, q], [k])
    fresh, back = _solve(system, beta[..., None] * v, -decay.since_start(erase))
    u, entering, S = _pass_on(fresh, back, decay.until_end(k), decay.whole(v), S)
    return scores @ u + decay.since_start(q) @ entering, S


def _dplr_segment(
    q: Tensor, k: Tensor, v: Tensor, b: Tensor, a: Tensor, log_decay: Tensor | None, S: Tensor, erase: str
) -> tuple[Tensor, Tensor]:
    """One segment. Erase after decay: b's row carries its own token's decay, and meets the keys strictly before it.

    Erase before decay: b reads what the token before left. That token's row is computed and moved down by one.
    """
    decay, late = decay_in_chunks(log_decay), erase == "decayed"
    row, seen = (b, decay.since_start(b)) if late else (F.pad(b[..., 1:, :], (0, 0, 0, 1)), decay.before_own(b))
    erasing, (by_u, by_v) = decay.products([row, q], [a, k])
    from_a, from_k = (p.tril(-1) if late else F.pad(p[..., :-1, :], (0, 0, 1, 0)) for p in erasing)
    fresh, back = _solve(-from_a, from_k @ v, seen)
    u, entering, S = _pass_on(fresh, back, decay.until_end(a), decay.whole(v), S, decay.until_end(k).mT @ v)
    return by_u @ u + by_v @ v + decay.since_start(q) @ entering, S


def _solve(system: Tensor, values: Tensor, seen: Tensor) -> list[Tensor]:
    """(I + strictly lower part of system)^-1 of both right-hand sides, (N B H C V) and (N B H C K)."""
    both = torch.cat([values, seen], -1)
    solved = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True)
    return list(solved.split([values.shape[-1], seen.shape[-1]], -1))


def _pass_on(fresh: Tensor, back: Tensor, keys: Tensor, whole: Tensor, S: Tensor, written: Tensor | None = None):
    """The only sequential part: u_n = fresh_n + back_n S, S <- whole_n S (+ written_n) + keys_n^T u_n.

    Gives all u (N B H C V), the states that entered each chunk (N B H K V), and the state that leaves the last.
    """
    N, B, H = fresh.shape[:3]
    us, entering, S = [], [], S.flatten(0, 1)
    added = [None] * N if written is None else written.flatten(1, 2).unbind(0)
    for f, b, k, w, more in zip(*(t.flatten(1, 2).unbind(0) for t in (fresh, back, keys, whole)), added):
        entering.append(S)
        us.append(torch.baddbmm(f, b, S))
        S = torch.baddbmm(w * S if more is None else torch.addcmul(more, w, S), k.mT, us[-1])
    return torch.stack(us).unflatten(1, (B, H)), torch.stack(entering).unflatten(1, (B, H)), S.unflatten(0, (B, H))


@operator()
def delta_step(
    q: Float[Tensor, "B 1 H K"],
    k: Float[Tensor, "B 1 H K"],
    v: Float[Tensor, "B 1 H V"],
    beta: Float[Tensor, "B 1 H"],
    log_decay: LogDecay | None,
    state: Float[Tensor, "B H K V"],
    scale: float = 1.0,
) -> tuple[Float[Tensor, "B 1 H V"], Float[Tensor, "B H K V"]]:
    """One token of delta_scan, by the rule itself."""
    row, key, value, strength = (t[:, 0].to(state.dtype) for t in (q, k, v, beta))
    S = decayed(state, log_decay)
    u = strength[..., None, None] * (value[..., None, :] - key[..., None, :] @ S)
    S = torch.addcmul(S, key[..., :, None], u)
    o = (scale * row)[..., None, :] @ S
    return o.transpose(1, 2).to(v.dtype), S


@operator()
def dplr_step(
    q: Float[Tensor, "B 1 H K"],
    k: Float[Tensor, "B 1 H K"],
    v: Float[Tensor, "B 1 H V"],
    read: Float[Tensor, "B 1 H K"],
    write: Float[Tensor, "B 1 H K"],
    log_decay: LogDecay | None,
    state: Float[Tensor, "B H K V"],
    scale: float = 1.0,
    erase: str = "decayed",
) -> tuple[Float[Tensor, "B 1 H V"], Float[Tensor, "B H K V"]]:
    """One token of dplr_scan, by the rule itself."""
    row, key, value, b, a = (t[:, 0].to(state.dtype) for t in (q, k, v, read, write))
    S = decayed(state, log_decay)
    u = b[..., None, :] @ (S if known(erase) == "decayed" else state)
    S = torch.addcmul(torch.addcmul(S, a[..., :, None], u), key[..., :, None], value[..., None, :])
    o = (scale * row)[..., None, :] @ S
    return o.transpose(1, 2).to(v.dtype), S


def known(erase: str) -> str:
    """Raises InputError for another word."""
    if erase not in ("decayed", "undecayed"):
        raise InputError(f"erase {erase!r}: say 'decayed' (b reads the decayed state) or 'undecayed' (as RWKV-7)")
    return erase


def delta_flops(
    T: int, B: int, H: int, K: int, V: int, mode: Mode, kind: DecayKind = "none", chunk_size: int = 64
) -> float:
    """Flops of delta_scan's matrix products over T tokens, or of delta_step; the triangular solve counts nothing."""
    if mode == "step":
        return 4.0 * B * H * K * V
    C = chunk_length(T, chunk_size)
    return n_chunks(T, chunk_size) * B * H * (2 * products_flops(C, K, kind) + 2.0 * C * C * V + 6.0 * C * K * V)


def dplr_flops(
    T: int, B: int, H: int, K: int, V: int, mode: Mode, kind: DecayKind = "none", chunk_size: int = 64
) -> float:
    """The same of dplr_scan and dplr_step."""
    if mode == "step":
        return 4.0 * B * H * K * V
    C = chunk_length(T, chunk_size)
    return n_chunks(T, chunk_size) * B * H * (4 * products_flops(C, K, kind) + 6.0 * C * C * V + 8.0 * C * K * V)


def reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    log_decay: LogDecay | None = None,
    state: Float[Tensor, "B H K V"] | None = None,
    scale: float = 1.0,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """The delta rule, token by token."""
    S, outs, I = (fresh_state(k, v) if state is None else state), [], torch.eye(k.shape[-1]).to(k)
    for t in range(q.shape[1]):
        b = beta[:, t, :, None, None]
        kk, kv = torch.einsum("bhk,bhl->bhkl", k[:, t], k[:, t]), torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        S = (I - b * kk) @ (_decay_at(log_decay, t) * S) + b * kv
        outs.append(scale * torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return (torch.stack(outs, 1) if outs else v), S


def dplr_reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    read: Float[Tensor, "B T H K"],
    write: Float[Tensor, "B T H K"],
    log_decay: LogDecay | None = None,
    state: Float[Tensor, "B H K V"] | None = None,
    scale: float = 1.0,
    erase: str = "decayed",
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Diagonal plus low rank, token by token."""
    S, outs = (fresh_state(k, v) if state is None else state), []
    for t in range(q.shape[1]):
        less = _decay_at(log_decay, t) * S
        u = torch.einsum("bhk,bhkv->bhv", read[:, t], less if known(erase) == "decayed" else S)
        S = less + torch.einsum("bhk,bhv->bhkv", write[:, t], u) + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outs.append(scale * torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return (torch.stack(outs, 1) if outs else v), S


def _decay_at(log_decay: Tensor | None, t: int) -> Tensor:
    """The decay of token t, to multiply a state (B H K V) with."""
    if log_decay is None:
        return torch.ones(())
    w = log_decay if log_decay.ndim == 1 else log_decay[:, t]
    return (w[..., None] if log_decay.ndim == 4 else w[..., None, None]).exp()
