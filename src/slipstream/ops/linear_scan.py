r"""The linear recurrence of a vector state: every channel forgets by its own decay and takes its own input.

    h_t = a_t * h_{t-1} + b_t          real or complex, any sign, any shape after (B T)

On a CPU one fused multiply-add a token, in place, beats every parallel scan: it reads each number once. Decays in log
space are exponentiated by the caller. The gradient is the same scan run backwards (Martin & Cundy 2018,
arXiv:1709.04057, section 2.3):

    G_t = g_t + conj(a_{t+1}) G_{t+1}      db_t = G_t      da_t = G_t conj(h_{t-1})

No second derivatives. A decay that is shared over tokens is passed expanded; many such modes a channel are lti_scan's.
"""

from __future__ import annotations

import torch
from jaxtyping import Inexact, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream.ops.dispatch import operator
from slipstream.ops.valid import valid_mask


@operator("decay", "b")
def linear_scan(
    decay: Inexact[Tensor, "B T *R"],
    b: Inexact[Tensor, "B T *R"],
    state: Inexact[Tensor, "B *R"] | None = None,
    lengths: Int[Tensor, "B"] | None = None,
) -> tuple[Inexact[Tensor, "B T *R"], Inexact[Tensor, "B *R"]]:
    """All states and the last, which is float32 at least. state: the one before the first token (None: zeros)."""
    kind = torch.promote_types(decay.dtype, b.dtype)
    wide = torch.promote_types(kind, torch.float32)
    start = b.new_zeros(b.shape[0], *b.shape[2:], dtype=wide) if state is None else state.to(wide)
    if b.shape[1] == 0:
        return b.to(kind), start
    h = _LinearScan.apply(*_keep_through_padding(decay.to(wide), b.to(wide), lengths), start)
    return h.to(kind), h[:, -1].clone()  # a copy: a view would keep all of h alive as long as the state


def _keep_through_padding(decay: Tensor, b: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Decay 1 and input 0 where a row is padded, so that its state stays what it was."""
    if lengths is None:
        return decay, b
    mask = valid_mask(lengths, b.shape[1])
    mask = mask.reshape(*mask.shape, *[1] * (b.ndim - 2))
    return torch.where(mask, decay, decay.new_ones(())), torch.where(mask, b, b.new_zeros(()))


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, decay: Tensor, b: Tensor, start: Tensor) -> Tensor:
        h = b.clone(memory_format=torch.contiguous_format)
        before = start
        for a_t, h_t in zip(decay.unbind(1), h.unbind(1)):
            before = h_t.addcmul_(a_t, before)
        ctx.save_for_backward(decay, h, start)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, h, start = ctx.saved_tensors
        decay = decay.conj().resolve_conj()
        g = grad.clone(memory_format=torch.contiguous_format)
        tokens = g.unbind(1)[::-1]
        for a_next, g_next, g_t in zip(decay.unbind(1)[::-1], tokens, tokens[1:]):
            g_t.addcmul_(a_next, g_next)
        g_decay = torch.empty_like(g)
        torch.mul(g[:, 0], start.conj(), out=g_decay[:, 0])
        torch.mul(g[:, 1:], h[:, :-1].conj(), out=g_decay[:, 1:])
        return g_decay, g, decay[:, 0] * g[:, 0]


def reference(
    decay: Inexact[Tensor, "B T *R"], b: Inexact[Tensor, "B T *R"], state: Inexact[Tensor, "B *R"]
) -> tuple[Inexact[Tensor, "B T *R"], Inexact[Tensor, "B *R"]]:
    """The recurrence, token by token."""
    hs = []
    for t in range(b.shape[1]):
        state = decay[:, t] * state + b[:, t]
        hs.append(state)
    return (torch.stack(hs, 1) if hs else b), state
