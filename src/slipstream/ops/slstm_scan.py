r"""The scalar memory of xLSTM: an LSTM with an exponential input gate, a normaliser, and heads that do not see each other.

    i, f, z, o = gates_t + U h_{t-1}         (by head: U is block-diagonal)
    c_t = f' c_{t-1} + i' tanh(z)            n_t = f' n_{t-1} + i'            h_t = sigmoid(o) * c_t / n_t
    m_t = max(log sigmoid(f) + m_{t-1}, i)   f' = exp(log sigmoid(f) + m_{t-1} - m_t)      i' = exp(i - m_t)

Beck et al. 2024 (arXiv:2405.04517, eq. 8-17) with the sigmoid forget gate of their code. One of f' and i' is always 1,
so n_t >= 1 from the first token on. No token can begin before the last one ends: the loop holds what must be in it and
no more, its gradient is written out, and the gradient of U is one product at the end.

No second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream.ops.dispatch import operator
from slipstream.ops.valid import last_tokens, zero_padding

SLSTMState = tuple[
    Float[Tensor, "B H K"], Float[Tensor, "B H K"], Float[Tensor, "B H K"], Float[Tensor, "B H K"]
]  # h, c, n, m; fresh: zeros, and m = -inf


@operator("gates")
def slstm_scan(
    gates: Float[Tensor, "B T 4 H K"],
    U: Float[Tensor, "4 H K K"],
    state: SLSTMState,
    lengths: Int[Tensor, "B"] | None = None,
) -> tuple[Float[Tensor, "B T H K"], SLSTMState]:
    """All h in the gates' dtype, and the last (h, c, n, m), float32 at least. Gates in the order i f z o."""
    return over_lines(_SLSTMScan.apply, gates, U, state, lengths)


def over_lines(
    scan: Callable[..., tuple[Tensor, ...]], gates: Tensor, U: Tensor, state: SLSTMState, lengths: Tensor | None
) -> tuple[Tensor, SLSTMState]:
    """The op by a scan of gates (T H B 4K), R (H K 4K) and states (H B K) that gives all h, c, n, m (T H B K)."""
    wide = torch.promote_types(gates.dtype, torch.float32)
    entering = [s.to(wide) for s in state]
    if gates.shape[1] == 0:
        return gates[:, :, 0], (entering[0], entering[1], entering[2], entering[3])
    by_time = zero_padding(gates, lengths).to(wide).permute(1, 3, 0, 2, 4).flatten(3)
    lines = scan(by_time, U.to(wide).permute(1, 3, 0, 2).flatten(2), *(s.transpose(0, 1) for s in entering))
    h, *kept = (line.permute(2, 0, 1, 3) for line in lines)
    last = [last_tokens(torch.cat([s[:, None], line], 1), 1, lengths)[:, 0] for s, line in zip(entering, (h, *kept))]
    return h.to(gates.dtype), (last[0], last[1], last[2], last[3])


class _SLSTMScan(torch.autograd.Function):
    """gates (T H B 4K), R (H K 4K), states (H B K) -> all h, c, n, m (T H B K)."""

    @staticmethod
    def forward(ctx, gates: Tensor, R: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        start, raw = (h, c, n, m), gates.clone(memory_format=torch.contiguous_format)
        lines = [raw.new_empty(*raw.shape[:3], raw.shape[3] // 4) for _ in start]
        for raw_t, i, f, z, o, h_t, c_t, n_t, m_t in zip(raw, *_parts(raw), *lines):
            torch.baddbmm(raw_t, h, R, out=raw_t)
            z.tanh_()
            o.sigmoid_()
            kept = F.logsigmoid(f).add_(m)
            torch.maximum(kept, i, out=m_t)
            kept, write = kept.sub_(m_t).exp_(), torch.sub(i, m_t).exp_()
            torch.mul(kept, c, out=c_t).addcmul_(write, z)
            torch.addcmul(write, kept, n, out=n_t)
            torch.div(c_t, n_t, out=h_t).mul_(o)
            h, c, n, m = h_t, c_t, n_t, m_t
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(raw, R, *start, *lines)
        return tuple(lines)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor, ...]:
        raw, R, *states = ctx.saved_tensors
        before, factors = local(raw, states[:4], states[4:])
        g_raw = torch.empty_like(raw)
        g_h, *g_start = _backwards(g_raw, R, grads, factors)
        g_R = torch.einsum("thbk,thbg->hkg", before, g_raw)
        return g_raw, g_R, g_h, *g_start


def _parts(raw: Tensor) -> tuple[Tensor, ...]:
    """The four gates of (T H B 4K)."""
    return raw.chunk(4, -1)


def local(raw: Tensor, start: Sequence[Tensor], lines: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """h before each token, and what the backward loop multiplies with, for all tokens at once. raw: the activated gates."""
    i, f, z, o = _parts(raw)
    h_0, c_0, n_0, m_0 = (torch.cat([s[None], line[:-1]]) for s, line in zip(start, lines))
    _, c, n, m = lines
    kept, write, ratio = (F.logsigmoid(f) + m_0 - m).exp(), (i - m).exp(), c / n
    older = (kept >= write).to(c.dtype)  # whether m_t came from the past
    return h_0, [
        o / n, ratio, ratio * o * (1 - o), write * (1 - z * z), z, c_0, n_0,
        kept, kept * (1 - older), write * older, older, torch.sigmoid(-f),
    ]  # fmt: skip


def _backwards(g_raw: Tensor, R: Tensor, grads: tuple[Tensor | None, ...], factors: list[Tensor]) -> tuple[Tensor, ...]:
    """Fill g_raw from the last token to the first; gives the gradients of the entering h, c, n, m."""
    g_h = g_c = g_n = g_m = torch.zeros_like(factors[0][0])
    given = [None if g is None else g.unbind(0) for g in grads]
    tokens = list(zip(g_raw, *_parts(g_raw), *factors))
    for t in range(len(tokens) - 1, -1, -1):
        g_t, g_i, g_f, g_z, g_o, read, ratio, by_o, by_z, z, c_0, n_0, kept, if_new, if_old, older, fade = tokens[t]
        g_h, g_c, g_n, g_m = (g if new is None else g + new[t] for g, new in zip((g_h, g_c, g_n, g_m), given))
        torch.mul(g_h, by_o, out=g_o)
        through = g_h * read
        g_c = g_c + through
        g_n = torch.addcmul(g_n, through, ratio, value=-1)
        torch.mul(g_c, by_z, out=g_z)
        g_older = torch.addcmul(g_n * n_0, g_c, c_0).mul_(if_new)  # by f' where it is below 1, by i' where that is
        g_older.addcmul_(torch.addcmul(g_n, g_c, z), if_old, value=-1).addcmul_(g_m, older)
        torch.sub(g_m, g_older, out=g_i)
        torch.mul(g_older, fade, out=g_f)
        g_h, g_c, g_n, g_m = torch.bmm(g_t, R.mT), g_c * kept, g_n * kept, g_older
    return g_h, g_c, g_n, g_m


def slstm_step(
    gates: Float[Tensor, "B 4 H K"], U: Float[Tensor, "4 H K K"], state: SLSTMState
) -> tuple[Float[Tensor, "B H K"], SLSTMState]:
    """One token, as printed."""
    h, c, n, m = state
    i, f, z, o = (gates.to(h.dtype) + torch.einsum("ghjk,bhk->bghj", U.to(h.dtype), h)).unbind(1)
    older = F.logsigmoid(f) + m
    m = torch.maximum(older, i)
    kept, write = (older - m).exp(), (i - m).exp()
    c, n = kept * c + write * torch.tanh(z), kept * n + write
    h = torch.sigmoid(o) * c / n
    return h.to(gates.dtype), (h, c, n, m)


def slstm_flops(tokens: int, n_heads: int, head_dim: int) -> float:
    """Flops of the matrix products U h of so many tokens."""
    return 2.0 * tokens * 4 * n_heads * head_dim * head_dim


def reference(
    gates: Float[Tensor, "B T 4 H K"], U: Float[Tensor, "4 H K K"], state: SLSTMState
) -> tuple[Float[Tensor, "B T H K"], SLSTMState]:
    """Token by token, with torch's own gradient."""
    hs = []
    for t in range(gates.shape[1]):
        h, state = slstm_step(gates[:, t], U, state)
        hs.append(h)
    return (torch.stack(hs, 1) if hs else gates[:, :, 0]), state
