r"""An elementwise recurrence whose forget gate sees the last state through a weight per channel: the cell of SRU.

    f_t = sigmoid(a_t + v * c_{t-1})        c_t = f_t * c_{t-1} + (1 - f_t) * u_t

(Lei et al. 2018, arXiv:1709.02755.) The peephole v makes it nonlinear: no scan runs it in parallel, but
channels never meet, so a token costs three passes over the state and no matrix product. Backwards it is linear, since
c_t changes with c_{t-1} by f_t + (c_{t-1} - u_t) f_t (1 - f_t) v: a linear scan that runs from the end.

No second derivatives.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream.ops.dispatch import operator
from slipstream.ops.linear_scan import linear_scan
from slipstream.ops.valid import last_tokens, zero_padding


@operator("u", "a")
def peephole_scan(
    u: Float[Tensor, "B T D"],
    a: Float[Tensor, "B T D"],
    v: Float[Tensor, "D"],
    state: Float[Tensor, "B D"],
    lengths: Int[Tensor, "B"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D"]]:
    """All states and the last: float32 at least, since other gates may look at them too."""
    u, a, v, state = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (u, a, v, state))
    c = _PeepholeScan.apply(zero_padding(u, lengths), zero_padding(a, lengths), v, state)
    return c, last_tokens(torch.cat([state[:, None], c], 1), 1, lengths)[:, 0].clone()


def peephole_step(
    u: Float[Tensor, "B D"], a: Float[Tensor, "B D"], v: Float[Tensor, "D"], state: Float[Tensor, "B D"]
) -> Float[Tensor, "B D"]:
    """One token: the new state."""
    return torch.lerp(
        u.to(state.dtype), state, torch.sigmoid(torch.addcmul(a.to(state.dtype), v.to(state.dtype), state))
    )


class _PeepholeScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, a: Tensor, v: Tensor, start: Tensor) -> Tensor:
        f, c, before = torch.empty_like(a), torch.empty_like(u), start
        for u_t, a_t, f_t, c_t in zip(u.unbind(1), a.unbind(1), f.unbind(1), c.unbind(1)):
            torch.addcmul(a_t, v, before, out=f_t).sigmoid_()
            before = torch.lerp(u_t, before, f_t, out=c_t)
        ctx.save_for_backward(u, v, start, f, c)
        return c

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        u, v, start, f, c = ctx.saved_tensors
        if u.shape[1] == 0:
            return u, u, torch.zeros_like(v), torch.zeros_like(start)
        before = torch.cat([start[:, None], c[:, :-1]], 1)
        slope = (before - u) * f * (1 - f)  # of c_t, along the gate's argument
        along = torch.addcmul(f, slope, v)  # of c_t, along c_{t-1}
        from_next = torch.cat([along[:, 1:], torch.zeros_like(along[:, :1])], 1)
        g = linear_scan(from_next.flip(1), grad.flip(1))[0].flip(1)
        g_a = g * slope
        return g * (1 - f), g_a, (g_a * before).sum((0, 1)), g[:, 0] * along[:, 0]


def reference(
    u: Float[Tensor, "B T D"], a: Float[Tensor, "B T D"], v: Float[Tensor, "D"], state: Float[Tensor, "B D"]
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D"]]:
    """The recurrence, token by token."""
    cs = []
    for t in range(u.shape[1]):
        f = torch.sigmoid(a[:, t] + v * state)
        state = f * state + (1 - f) * u[:, t]
        cs.append(state)
    return (torch.stack(cs, 1) if cs else u), state
