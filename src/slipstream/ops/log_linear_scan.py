r"""A matrix state for every scale of the past: linear attention whose memory grows with the logarithm of what it saw.

    o_t = scale * sum_{s<=t} level_scale_t[level(t, s)] exp(G_t - G_s) (q_t . k_s) v_s        G_t = sum_{r<=t} log_decay_r
    level(t, s) = min(number of bits of (t xor s), L - 1)

The last tokens are told apart, older ones in blocks of 1, 2, 4, ... tokens, as a Fenwick tree lays them out (Guo et al.
2025, arXiv:2506.04761, sec. 3). Level 0 is the token itself; level l > 0 is a state (K V), filled where bit l - 1 of t is
set. A new token goes to the lowest empty level, and takes all below with it: a binary counter. The last level takes
everything older. log_decay is one number a head and token, finite and <= 0. Positions count from the start of each
row, so the state carries how many tokens it has seen.

Inside a chunk of C tokens all levels are one masked product. Chunks begin at multiples of C, so that what enters one
lies in levels above log2 C; each chunk reads those that can be filled: T log T work.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.mixer import Mode
from slipstream.ops.chunks import HeadDecay, accumulation_dtype, chunk_length
from slipstream.ops.dispatch import operator
from slipstream.ops.places import cut_out
from slipstream.ops.valid import zero_padding

Levels = tuple[Float[Tensor, "B J H K V"], Int[Tensor, "B"]]  # the states of levels 1 .. J = L - 1, and tokens seen


@operator("q", "k", "v", "log_decay", "level_scale")
def log_linear_scan(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H"],
    level_scale: Float[Tensor, "B T H L"],
    state: Levels | None = None,
    lengths: Int[Tensor, "B"] | None = None,
    scale: float = 1.0,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T H V"], Levels]:
    """Outputs in v's dtype, and the state after each row's last token (nothing seen when state is None)."""
    S, seen = state or fresh_levels(k, v, level_scale.shape[-1])
    S, T, C = S.to(accumulation_dtype(v, S)), q.shape[1], chunk_length(q.shape[1], chunk_size)
    if T == 0 or len(seen) == 0:
        return v, (S, seen)
    inside = seen % C  # tokens of its chunk that a row has seen already
    N = -(-(T + int(inside.max())) // C)
    lines = (zero_padding(t, lengths).to(S.dtype) for t in (q * scale, k, v, log_decay, level_scale))
    q, k, u, log_decay, level_scale = (cut_out(t, -inside, N * C).unflatten(1, (N, C)).transpose(2, 3) for t in lines)
    after = seen + (T if lengths is None else lengths)
    whole = after // C - seen // C  # chunks that a row fills
    o, S = _through(q, k, u, log_decay, level_scale, S, seen, whole)
    k, u, log_decay = (
        cut_out(t.transpose(2, 3).flatten(1, 2), whole * C, C).transpose(1, 2) for t in (k, u, log_decay)
    )
    S = _begin(k, u, log_decay, S, torch.maximum(seen, after - after % C), after)
    return cut_out(o.transpose(2, 3).flatten(1, 2), inside, T).to(v.dtype), (S, after)


def _through(
    q: Float[Tensor, "B N H C K"],
    k: Float[Tensor, "B N H C K"],
    v: Float[Tensor, "B N H C V"],
    log_decay: Float[Tensor, "B N H C"],
    scales: Float[Tensor, "B N H C L"],
    S: Float[Tensor, "B J H K V"],
    seen: Int[Tensor, "B"],
    whole: Int[Tensor, "B"],
) -> tuple[Float[Tensor, "B N H C V"], Float[Tensor, "B J H K V"]]:
    """Outputs of all chunks, and each row's states after its whole ones."""
    C, decay = q.shape[3], HeadDecay(log_decay)
    own = torch.arange(C, device=q.device)
    ((scores,),) = decay.products([q], [k])
    inner = _level(own[:, None] ^ own, S.shape[1]).expand(scores.shape)
    chunks = zip(*(t.unbind(1) for t in (decay.since_start(q), scales, decay.until_end(k).mT @ v, decay.whole(v))))
    kept, reads, before, begin, furthest = S, [], seen, seen - seen % C, int(seen.max())
    for n, (rows, weights, written, fade) in enumerate(chunks):
        lowest = 0 if n == 0 and int((seen % C).max()) else C.bit_length() - 1
        levels = _levels_at(before, begin[:, None] + own, S.shape[1])
        reads.append(_read(rows, weights, S, levels, lowest, furthest.bit_length()))
        end = begin + C
        S = _moved(fade[:, None] * S, before, end) + _at_level(_level(end ^ (end - 1), S.shape[1]), written, S)
        kept = torch.where((whole == n + 1)[:, None, None, None, None], S, kept)
        before = begin = end
        furthest = furthest - furthest % C + C
    return (scores * scales.gather(-1, inner)) @ v + torch.stack(reads, 1), kept


def _read(
    rows: Float[Tensor, "B H C K"],
    scales: Float[Tensor, "B H C L"],
    S: Float[Tensor, "B J H K V"],
    levels: Int[Tensor, "B C J"],
    lowest: int,
    highest: int,
) -> Float[Tensor, "B H C V"]:
    """What a chunk reads of the states that entered it; those below `lowest` and from `highest` on are empty."""
    some = slice(min(lowest, S.shape[1] - 1), highest)
    weights = scales.gather(-1, levels[:, None, :, some].expand(-1, rows.shape[1], -1, -1))
    return (weights.movedim(-1, 1)[..., None] * (rows[:, None] @ S[:, some])).sum(1)


def _begin(
    k: Float[Tensor, "B H C K"],
    v: Float[Tensor, "B H C V"],
    log_decay: Float[Tensor, "B H C"],
    S: Float[Tensor, "B J H K V"],
    before: Int[Tensor, "B"],
    after: Int[Tensor, "B"],
) -> Float[Tensor, "B J H K V"]:
    """The states after the last tokens, which fill no chunk: they stand in levels of their own."""
    C, J, decay = k.shape[2], S.shape[1], HeadDecay(log_decay[None])
    S = _moved(decay.whole(v[None])[0, :, None] * S, before, after)
    n_levels = min(C.bit_length() - 1, J)
    place = after - after % C + torch.arange(C, device=k.device)[:, None]
    level = _level(after ^ place, J).T  # (B C)
    mine = level[:, None] == torch.arange(1, n_levels + 1, device=k.device)[:, None]
    written = (decay.until_end(k[None])[0][:, None] * mine[:, :, None, :, None]).mT @ v[:, None]
    return S + F.pad(written, (0, 0, 0, 0, 0, 0, 0, J - n_levels))


def log_linear_step(
    q: Float[Tensor, "B 1 H K"],
    k: Float[Tensor, "B 1 H K"],
    v: Float[Tensor, "B 1 H V"],
    log_decay: Float[Tensor, "B 1 H"],
    level_scale: Float[Tensor, "B 1 H L"],
    state: Levels,
    scale: float = 1.0,
) -> tuple[Float[Tensor, "B 1 H V"], Levels]:
    """One token of log_linear_scan, by the rule itself. Reads every level, the empty ones too: shapes are static."""
    S, seen = state
    J = S.shape[1]
    row, key, value, fade, scales = (t[:, 0].to(S.dtype) for t in (q * scale, k, v, log_decay, level_scale))
    S = fade.exp()[:, None, :, None, None] * S
    weights = scales.gather(-1, _levels_at(seen, seen[:, None], J).expand(-1, row.shape[1], -1))
    read = (weights.mT[..., None] * (row[:, None, :, None] @ S).squeeze(-2)).sum(1)
    o = read + scales[..., :1] * (row * key).sum(-1, keepdim=True) * value
    S = _moved(S, seen, seen + 1)
    S = S + _at_level(_level((seen + 1) ^ seen, J), key[..., :, None] * value[..., None, :], S)
    return o[:, None].to(v.dtype), (S, seen + 1)


def _level(differing: Int[Tensor, "*A"], J: int) -> Int[Tensor, "*A"]:
    """Number of bits, at most J."""
    return (differing[..., None] >= 2 ** torch.arange(J, device=differing.device)).sum(-1)


def _levels_at(before: Int[Tensor, "B"], place: Int[Tensor, "B P"], J: int) -> Int[Tensor, "B P J"]:
    """The level that each state, as it stands after `before` tokens, has for the token at a place not before those.

    A state's block begins where its own bit of `before`, and all below, are cleared; the last level stays the last.
    """
    j = torch.arange(J, device=before.device)
    block = (before[:, None] >> (j + 1)) << (j + 1)
    return torch.where(j == J - 1, J, _level(place[..., None] ^ block[:, None], J))


def _moved(S: Tensor, before: Int[Tensor, "B"], after: Int[Tensor, "B"]) -> Float[Tensor, "B J H K V"]:
    """The states in their levels after more tokens, joined where they fall together. What is empty may fall anywhere."""
    to = (_levels_at(before, after[:, None], S.shape[1])[:, 0] - 1).clamp(min=0)
    return torch.zeros_like(S).scatter_add(1, to[..., None, None, None].expand_as(S), S)


def _at_level(level: Int[Tensor, "B"], written: Float[Tensor, "B H K V"], like: Tensor) -> Float[Tensor, "B J H K V"]:
    """What was written, in its level; zeros in the others."""
    mine = level[:, None] == torch.arange(1, like.shape[1] + 1, device=level.device)
    return mine[..., None, None, None] * written[:, None]


def fresh_levels(k: Float[Tensor, "B T H K"], v: Float[Tensor, "B T H V"], n_levels: int) -> Levels:
    """Nothing seen: zeros, in float32 at least."""
    S = v.new_zeros(len(k), n_levels - 1, *k.shape[2:], v.shape[3], dtype=accumulation_dtype(v))
    return S, torch.zeros(len(k), dtype=torch.long, device=k.device)


def log_linear_flops(T: int, B: int, H: int, K: int, V: int, n_levels: int, mode: Mode, chunk_size: int = 64) -> float:
    """Flops of the matrix products of the first T tokens, or of one (step)."""
    if mode == "step":
        return 2.0 * B * H * (n_levels - 1) * K * V
    C, J = chunk_length(T, chunk_size), n_levels - 1
    c, N = C.bit_length() - 1, -(-T // C)
    per_bits = {
        b: min(2**b, N) - 2 ** (b - 1) for b in range(1, (N - 1).bit_length() + 1)
    }  # chunks by bits of their number
    reads = sum(n * (min(J, b + c) - min(c, J - 1)) for b, n in per_bits.items())
    inner, state = 2.0 * N * C * C * (K + V), 2.0 * C * K * V
    return B * H * (inner + state * (N + reads + min(c, J)))


def reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H"],
    level_scale: Float[Tensor, "B T H L"],
    state: Levels | None = None,
    scale: float = 1.0,
) -> tuple[Float[Tensor, "B T H V"], Levels]:
    """The binary counter, row by row and token by token."""
    S, seen = state or fresh_levels(k, v, level_scale.shape[-1])
    rows, finals = [], []
    for b, n in enumerate(seen.tolist()):
        levels, outs = list(S[b].unbind(0)), []
        for t in range(q.shape[1]):
            levels = [log_decay[b, t].exp()[:, None, None] * s for s in levels]
            carry = torch.einsum("hk,hv->hkv", k[b, t], v[b, t])
            read = torch.stack([torch.einsum("hkv,hk->hv", s, q[b, t]) for s in (carry, *levels)])
            outs.append(scale * torch.einsum("hl,lhv->hv", level_scale[b, t], read))
            j = 0
            while j < len(levels) - 1 and n >> j & 1:
                levels[j], carry, j = torch.zeros_like(carry), carry + levels[j], j + 1
            levels[j], n = levels[j] + carry, n + 1
        rows.append(torch.stack(outs) if outs else v[b])
        finals.append(torch.stack(levels))
    return torch.stack(rows), (torch.stack(finals), seen + q.shape[1])
