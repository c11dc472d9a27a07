r"""The selective recurrence of Mamba: a state of D x N whose decay and input are formed on the fly, token by token.

    h_t = a_t * h_{t-1} + (dt_t x_t) B_t^T          y_t = h_t C_t          h, a_t (D N)
    a_t = exp(dt_t A)  or, signed,  2 exp(dt_t A) - 1  or, without A,  1 - dt_t (B_t * B_t)^T
    with softplus, dt is softplus(dt);  with D, y_t + D x_t;  with a gate z, all of that times silu(z_t)

Gu & Dao 2023, arXiv:2312.00752, eq. 2a and 2b with A by zero-order hold and B by Euler's rule, as the authors' code has
it. Signed: decays from -1 to 1, with which parities can be tracked (Grazzi et al. 2024, arXiv:2411.12537, section 5).
Without A: the implicit update of Longhorn (Liu et al. 2024, arXiv:2407.14207). The tensor B T D N never exists: a chunk
of tokens is expanded at a time, and the backward pass makes each chunk anew from the state it began with. Within a
chunk the channels D lie innermost (N D), so that every product is one long vector. A must be <= 0, dt >= 0, and without
A, dt B^2 <= 1. No second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream.ops.dispatch import operator
from slipstream.ops.silu_gate import silu_gate
from slipstream.ops.valid import zero_padding


@operator("x", "dt", "B", "C", "gate")
def selective_scan(
    x: Float[Tensor, "B T D"],
    dt: Float[Tensor, "B T D"],
    A: Float[Tensor, "D N"] | None,
    B: Float[Tensor, "B T N"],
    C: Float[Tensor, "B T N"],
    state: Float[Tensor, "B D N"] | None = None,
    lengths: Int[Tensor, "B"] | None = None,
    chunk_size: int = 16,
    signed: bool = False,
    softplus: bool = False,
    D: Float[Tensor, "D"] | None = None,
    gate: Float[Tensor, "B T D"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D N"]]:
    """y in x's dtype and the last state, float32 at least. chunk_size: 16 keeps a chunk in the cache of one core."""
    wide = torch.promote_types(x.dtype, torch.float32)
    start = x.new_zeros(x.shape[0], x.shape[2], B.shape[2], dtype=wide) if state is None else state.to(wide)
    if x.shape[1] == 0:
        return x, start
    x, dt = zero_padding(x, lengths), zero_padding(dt, lengths)
    step = zero_padding(F.softplus(dt.to(wide)), lengths) if softplus else dt
    wx, wdt, wB, wC = (
        v.to(wide).transpose(0, 1) for v in (x, step, zero_padding(B, lengths), zero_padding(C, lengths))
    )
    rate = -wB.square().unsqueeze(-1) if A is None else A.to(wide).mT.contiguous()[None, None]
    decay = LINEAR if A is None else SIGNED if signed else EXPONENTIAL
    y, final = _SelectiveScan.apply(wdt, wdt * wx, rate, wB, wC, start.mT.contiguous(), decay, chunk_size)
    return skipped_and_gated(y.transpose(0, 1).to(x.dtype), x, D, gate, lengths), final.mT.contiguous()


def skipped_and_gated(
    o: Float[Tensor, "B T D"],
    x: Float[Tensor, "B T D"],
    D: Float[Tensor, "D"] | None,
    gate: Float[Tensor, "B T D"] | None,
    lengths: Int[Tensor, "B"] | None = None,
) -> Float[Tensor, "B T D"]:
    """(o + D x) * silu(gate), in o's dtype."""
    o = o if D is None else torch.addcmul(o, D.to(o.dtype), zero_padding(x, lengths))
    return o if gate is None else silu_gate(o, zero_padding(gate, lengths))


def selective_step(
    x: Float[Tensor, "B D"],
    dt: Float[Tensor, "B D"],
    A: Float[Tensor, "D N"] | None,
    B: Float[Tensor, "B N"],
    C: Float[Tensor, "B N"],
    state: Float[Tensor, "B D N"],
    signed: bool = False,
) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D N"]]:
    """One token."""
    dt, key = dt.to(state.dtype)[..., None], B.to(state.dtype)[:, None]
    decay = 1 - dt * key.square() if A is None else torch.exp(dt * A.to(state.dtype))
    state = (2 * decay - 1 if signed else decay) * state + dt * x[..., None] * key
    return torch.matmul(state, C.to(state.dtype)[..., None]).squeeze(-1).to(x.dtype), state


def selective_scan_flops(tokens: int, width: int, d_state: int) -> float:
    """Flops of the matrix products (y = h C) of so many tokens; the recurrence itself is elementwise."""
    return 2.0 * tokens * width * d_state


class Decay(NamedTuple):
    """The decay from e = dt * rate, and its slope there from the decay; both work in place."""

    of_: Callable[[Tensor], Tensor]
    slope_: Callable[[Tensor], Tensor]


EXPONENTIAL = Decay(torch.exp_, lambda a: a)
SIGNED = Decay(lambda e: torch.exp_(e).mul_(2).sub_(1), lambda a: a.add_(1))
LINEAR = Decay(lambda e: e.add_(1), lambda a: a.fill_(1))


class _SelectiveScan(torch.autograd.Function):
    """Time-major: dt and u = dt x (T B D), B and C (T B N), h (B N D); rate (1 1 N D), or by token (T B N 1)."""

    @staticmethod
    def forward(
        ctx, dt: Tensor, u: Tensor, rate: Tensor, B: Tensor, C: Tensor, start: Tensor, decay: Decay, chunk_size: int
    ):
        room = [dt.new_empty(min(chunk_size, len(dt)), *start.shape) for _ in range(2)]
        y = torch.empty_like(u, memory_format=torch.contiguous_format)
        bounds = []
        for s in range(0, len(dt), chunk_size):
            bounds.append(start)
            t = slice(s, s + chunk_size)
            _, h = _expand(dt[t], u[t], _during(rate, t), B[t], start, decay, room)
            torch.matmul(C[t].unsqueeze(-2), h, out=y[t].unsqueeze(-2))
            start = h[-1].clone()
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(dt, u, rate, B, C, *bounds)
            ctx.decay, ctx.chunk_size = decay, chunk_size
        return y, start

    @staticmethod
    @once_differentiable
    def backward(ctx, gy: Tensor, carry: Tensor):
        dt, u, rate, B, C, *bounds = ctx.saved_tensors
        grads = [torch.empty_like(v, memory_format=torch.contiguous_format) for v in (dt, u, B, C)]
        g_rate = torch.zeros_like(rate)
        room = [dt.new_empty(min(ctx.chunk_size, len(dt)), *carry.shape) for _ in range(3)]
        for i in reversed(range(len(bounds))):
            t = slice(i * ctx.chunk_size, (i + 1) * ctx.chunk_size)
            inputs = (dt[t], u[t], _during(rate, t), B[t], C[t], bounds[i])
            outputs = (*(g[t] for g in grads), _during(g_rate, t))
            carry = _chunk_gradients(inputs, gy[t], carry, outputs, ctx.decay, room)
        return grads[0], grads[1], g_rate, grads[2], grads[3], carry, None, None


def _during(rate: Tensor, t: slice) -> Tensor:
    """The rates of some tokens, where they differ by token."""
    return rate if len(rate) == 1 else rate[t]


def _expand(
    dt: Tensor, u: Tensor, rate: Tensor, B: Tensor, start: Tensor, decay: Decay, room: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Decays and states (C B N D) of one chunk, in the room given."""
    a, h = (r[: len(dt)] for r in room[:2])
    decay.of_(torch.mul(dt.unsqueeze(-2), rate, out=a))
    torch.mul(u.unsqueeze(-2), B.unsqueeze(-1), out=h)
    for a_t, h_t in zip(a.unbind(0), h.unbind(0)):
        start = h_t.addcmul_(a_t, start)
    return a, h


def _chunk_gradients(
    inputs: tuple[Tensor, ...], gy: Tensor, carry: Tensor, grads: tuple[Tensor, ...], decay: Decay, room: list[Tensor]
) -> Tensor:
    """Write a chunk's gradients (dt, u, B, C), add to the rate's, and return that of the state it began with."""
    dt, u, rate, B, C, start = inputs
    g_dt, g_u, g_B, g_C, g_rate = grads
    a, h = _expand(dt, u, rate, B, start, decay, room)
    g = torch.mul(gy.unsqueeze(-2), C.unsqueeze(-1), out=room[2][: len(dt)])
    g[-1].add_(carry)
    tokens = g.unbind(0)[::-1]
    for a_next, g_next, g_t in zip(a.unbind(0)[::-1], tokens, tokens[1:]):
        g_t.addcmul_(a_next, g_next)
    torch.matmul(h, gy.unsqueeze(-1), out=g_C.unsqueeze(-1))
    torch.matmul(g, u.unsqueeze(-1), out=g_B.unsqueeze(-1))
    torch.matmul(B.unsqueeze(-2), g, out=g_u.unsqueeze(-2))
    carry = a[0] * g[0]
    g.mul_(decay.slope_(a))
    g[0].mul_(start)  # from here on g is the gradient of the product dt * rate
    g[1:].mul_(h[:-1])
    g_rate += torch.mul(g, dt.unsqueeze(-2), out=a).sum_to_size(rate.shape)
    torch.sum(torch.mul(g, rate, out=h), -2, out=g_dt)
    return carry


def reference(
    x: Float[Tensor, "B T D"],
    dt: Float[Tensor, "B T D"],
    A: Float[Tensor, "D N"] | None,
    B: Float[Tensor, "B T N"],
    C: Float[Tensor, "B T N"],
    state: Float[Tensor, "B D N"],
    signed: bool = False,
    softplus: bool = False,
    D: Float[Tensor, "D"] | None = None,
    gate: Float[Tensor, "B T D"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D N"]]:
    """The equation, token by token."""
    ys, dt = [], torch.log1p(torch.exp(dt)) if softplus else dt
    for t in range(x.shape[1]):
        if A is None:
            decay = 1 - torch.einsum("bd,bn->bdn", dt[:, t], B[:, t] ** 2)
        else:
            decay = torch.exp(torch.einsum("bd,dn->bdn", dt[:, t], A))
        decay = 2 * decay - 1 if signed else decay
        state = decay * state + torch.einsum("bd,bn->bdn", dt[:, t] * x[:, t], B[:, t])
        ys.append(torch.einsum("bdn,bn->bd", state, C[:, t]))
    y = (torch.stack(ys, 1) if ys else x) + (0 if D is None else D * x)
    return y if gate is None else y * gate * torch.sigmoid(gate), state
