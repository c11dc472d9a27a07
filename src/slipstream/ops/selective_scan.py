r"""The selective recurrence of Mamba: a state of D x N whose decay and input are formed on the fly, token by token.

    h_t = exp(dt_t A) * h_{t-1} + (dt_t x_t) B_t^T          y_t = h_t C_t          h (D N)

Gu & Dao 2023, arXiv:2312.00752, eq. 2a and 2b with A by zero-order hold and B by Euler's rule, as the authors' code has
it. The tensor B T D N never exists: a chunk of tokens is expanded at a time, and the backward pass makes each chunk
anew from the state it began with. Within a chunk the channels D lie innermost (N D), so that every product is one long
vector. A must be <= 0 and dt >= 0. The skip D x and the gate belong to the mixer. No second derivatives.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream.ops.dispatch import operator
from slipstream.ops.valid import zero_padding


@operator("x", "dt", "B", "C")
def selective_scan(
    x: Float[Tensor, "B T D"],
    dt: Float[Tensor, "B T D"],
    A: Float[Tensor, "D N"],
    B: Float[Tensor, "B T N"],
    C: Float[Tensor, "B T N"],
    state: Float[Tensor, "B D N"] | None = None,
    lengths: Int[Tensor, "B"] | None = None,
    chunk_size: int = 16,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D N"]]:
    """y in x's dtype and the last state, float32 at least. chunk_size: 16 keeps a chunk in the cache of one core."""
    wide = torch.promote_types(x.dtype, torch.float32)
    start = x.new_zeros(x.shape[0], *A.shape, dtype=wide) if state is None else state.to(wide)
    if x.shape[1] == 0:
        return x, start
    wx, wdt, wB, wC = (zero_padding(v, lengths).to(wide).transpose(0, 1) for v in (x, dt, B, C))
    A, start = A.to(wide).mT.contiguous(), start.mT.contiguous()
    y, final = _SelectiveScan.apply(wdt, wdt * wx, A, wB, wC, start, chunk_size)
    return y.transpose(0, 1).to(x.dtype), final.mT.contiguous()


def selective_step(
    x: Float[Tensor, "B D"],
    dt: Float[Tensor, "B D"],
    A: Float[Tensor, "D N"],
    B: Float[Tensor, "B N"],
    C: Float[Tensor, "B N"],
    state: Float[Tensor, "B D N"],
) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D N"]]:
    """One token."""
    wide = state.dtype
    dt, A = dt.to(wide), A.to(wide)
    state = torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B.to(wide)[:, None]
    return torch.matmul(state, C.to(wide)[..., None]).squeeze(-1).to(x.dtype), state


def selective_scan_flops(tokens: int, width: int, d_state: int) -> float:
    """Flops of the matrix products (y = h C) of so many tokens; the recurrence itself is elementwise."""
    return 2.0 * tokens * width * d_state


class _SelectiveScan(torch.autograd.Function):
    """Time-major: dt and u = dt x (T B D), A (N D), B and C (T B N), h (B N D)."""

    @staticmethod
    def forward(ctx, dt: Tensor, u: Tensor, A: Tensor, B: Tensor, C: Tensor, start: Tensor, chunk_size: int):
        room = [dt.new_empty(min(chunk_size, len(dt)), *start.shape) for _ in range(2)]
        y = torch.empty_like(u, memory_format=torch.contiguous_format)
        bounds = []
        for s in range(0, len(dt), chunk_size):
            bounds.append(start)
            t = slice(s, s + chunk_size)
            _, h = _expand(dt[t], u[t], A, B[t], start, room)
            torch.matmul(C[t].unsqueeze(-2), h, out=y[t].unsqueeze(-2))
            start = h[-1].clone()
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(dt, u, A, B, C, *bounds)
            ctx.chunk_size = chunk_size
        return y, start

    @staticmethod
    @once_differentiable
    def backward(ctx, gy: Tensor, carry: Tensor):
        dt, u, A, B, C, *bounds = ctx.saved_tensors
        grads = [torch.empty_like(v, memory_format=torch.contiguous_format) for v in (dt, u, B, C)]
        gA = torch.zeros_like(A)
        room = [dt.new_empty(min(ctx.chunk_size, len(dt)), *carry.shape) for _ in range(3)]
        for i in reversed(range(len(bounds))):
            t = slice(i * ctx.chunk_size, (i + 1) * ctx.chunk_size)
            inputs = (dt[t], u[t], A, B[t], C[t], bounds[i])
            carry = _chunk_gradients(inputs, gy[t], carry, [g[t] for g in grads], gA, room)
        return grads[0], grads[1], gA, grads[2], grads[3], carry, None


def _expand(dt: Tensor, u: Tensor, A: Tensor, B: Tensor, start: Tensor, room: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Decays and states (C B N D) of one chunk, in the room given."""
    a, h = (r[: len(dt)] for r in room[:2])
    torch.mul(dt.unsqueeze(-2), A, out=a).exp_()
    torch.mul(u.unsqueeze(-2), B.unsqueeze(-1), out=h)
    for a_t, h_t in zip(a.unbind(0), h.unbind(0)):
        start = h_t.addcmul_(a_t, start)
    return a, h


def _chunk_gradients(
    inputs: tuple[Tensor, ...], gy: Tensor, carry: Tensor, grads: list[Tensor], gA: Tensor, room: list[Tensor]
) -> Tensor:
    """Write a chunk's gradients (dt, u, B, C), add to A's, and return that of the state it began with."""
    dt, u, A, B, C, start = inputs
    g_dt, g_u, g_B, g_C = grads
    a, h = _expand(dt, u, A, B, start, room)
    g = torch.mul(gy.unsqueeze(-2), C.unsqueeze(-1), out=room[2][: len(dt)])
    g[-1].add_(carry)
    tokens = g.unbind(0)[::-1]
    for a_next, g_next, g_t in zip(a.unbind(0)[::-1], tokens, tokens[1:]):
        g_t.addcmul_(a_next, g_next)
    torch.matmul(h, gy.unsqueeze(-1), out=g_C.unsqueeze(-1))
    torch.matmul(g, u.unsqueeze(-1), out=g_B.unsqueeze(-1))
    torch.matmul(B.unsqueeze(-2), g, out=g_u.unsqueeze(-2))
    g.mul_(a)
    carry = g[0].clone()
    g[0].mul_(start)  # from here on g is the gradient of the exponent dt A
    g[1:].mul_(h[:-1])
    gA += torch.mul(g, dt.unsqueeze(-2), out=a).sum((0, 1))
    torch.sum(torch.mul(g, A, out=h), -2, out=g_dt)
    return carry


def reference(
    x: Float[Tensor, "B T D"],
    dt: Float[Tensor, "B T D"],
    A: Float[Tensor, "D N"],
    B: Float[Tensor, "B T N"],
    C: Float[Tensor, "B T N"],
    state: Float[Tensor, "B D N"],
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D N"]]:
    """The equation, token by token."""
    ys = []
    for t in range(x.shape[1]):
        decay = torch.exp(torch.einsum("bd,dn->bdn", dt[:, t], A))
        state = decay * state + torch.einsum("bd,bn->bdn", dt[:, t] * x[:, t], B[:, t])
        ys.append(torch.einsum("bdn,bn->bd", state, C[:, t]))
    return (torch.stack(ys, 1) if ys else x), state
