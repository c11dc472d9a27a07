r"""A recurrence part of whose state is squashed and part of which stays linear: a nonlinear net beside a linear memory.

    s_t = f(x_t + U s_{t-1})        f is tanh on the first n_tanh channels of s, and the identity on the others

With n_tanh the whole width it is an Elman network; the Legendre Memory Unit is one with a fixed linear part. A token costs one
matrix product. The gradient is written out: step by step only what must be, the weights' in one product at the end.
U must not make the linear part grow.

No second derivatives.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream.ops.dispatch import operator
from slipstream.ops.valid import last_tokens, zero_padding


@operator("x")
def semilinear_scan(
    x: Float[Tensor, "B T S"],
    U: Float[Tensor, "S S"],
    n_tanh: int,
    state: Float[Tensor, "B S"],
    lengths: Int[Tensor, "B"] | None = None,
) -> tuple[Float[Tensor, "B T S"], Float[Tensor, "B S"]]:
    """All states in x's dtype, and the last, float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    s = _SemilinearScan.apply(zero_padding(x, lengths).to(wide), U.to(wide), n_tanh, state.to(wide))
    return s.to(x.dtype), last_tokens(torch.cat([state[:, None].to(wide), s], 1), 1, lengths)[:, 0].clone()


def semilinear_step(
    x: Float[Tensor, "B S"], U: Float[Tensor, "S S"], n_tanh: int, state: Float[Tensor, "B S"]
) -> Float[Tensor, "B S"]:
    """One token: the new state."""
    s = torch.addmm(x.to(state.dtype), state, U.to(state.dtype).T)
    return torch.cat([torch.tanh(s[:, :n_tanh]), s[:, n_tanh:]], 1)


def semilinear_flops(tokens: int, width: int) -> float:
    """Flops of the matrix product of so many tokens."""
    return 2.0 * tokens * width * width


class _SemilinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, U: Tensor, n_tanh: int, start: Tensor) -> Tensor:
        x, before = x.transpose(0, 1), start
        s = x.new_empty(x.shape)  # (T B S): each token's rows lie together
        for x_t, s_t in zip(x, s):
            torch.addmm(x_t, before, U.T, out=s_t)[:, :n_tanh].tanh_()
            before = s_t
        ctx.n_tanh = n_tanh
        ctx.save_for_backward(out := s.transpose(0, 1), U, start)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor]:
        out, U, start = ctx.saved_tensors
        s = out.transpose(0, 1)
        g = grad.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        bend = 1 - s[..., : ctx.n_tanh].square()
        for t in range(len(g) - 1, -1, -1):
            if t + 1 < len(g):
                g[t].addmm_(g[t + 1], U)
            g[t, :, : ctx.n_tanh].mul_(bend[t])
        before = torch.cat([start[None], s[:-1]])[: len(g)]
        g_start = g[0] @ U if len(g) else torch.zeros_like(start)
        return g.transpose(0, 1), g.flatten(0, 1).T @ before.flatten(0, 1), None, g_start


def reference(
    x: Float[Tensor, "B T S"], U: Float[Tensor, "S S"], n_tanh: int, state: Float[Tensor, "B S"]
) -> tuple[Float[Tensor, "B T S"], Float[Tensor, "B S"]]:
    """The recurrence, token by token."""
    ss = []
    for t in range(x.shape[1]):
        s = x[:, t] + torch.einsum("ij,bj->bi", U, state)
        state = torch.cat([torch.tanh(s[:, :n_tanh]), s[:, n_tanh:]], 1)
        ss.append(state)
    return (torch.stack(ss, 1) if ss else x), state
