r"""A mixture of gated networks over whole sequences: each expert on the tokens that chose it, one expert after another.

    y_t = sum_i w_ti W_down^e gated(W_gate_up^e x_t + b^e)        e = e_ti; numbers of E and more are none, and say nothing

What an expert makes of its tokens stays in the cache until it is added to theirs: neither rows sorted by expert nor outputs
row by row are kept. For gradients only what goes into `gated` is. Asks the host for how many chose whom.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

Gated = Callable[[Tensor], Tensor]  # (n 2F) -> (n F), row by row and differentiable


def expert_mlp(
    x: Float[Tensor, "T D"],
    chosen: Int[Tensor, "T k"],
    weights: Float[Tensor, "T k"],
    gate_up: Float[Tensor, "E F2 D"],
    down: Float[Tensor, "E D F"],
    gated: Gated,
    bias: Float[Tensor, "E F2"] | None = None,
) -> Float[Tensor, "T D"]:
    """y in the dtype of x; under autocast in its own."""
    if torch.is_autocast_enabled(x.device.type):  # which does not look into a function with gradients of its own
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weights, gate_up, down = (t.to(dtype) for t in (x, weights, gate_up, down))
        bias = None if bias is None else bias.to(dtype)
    flat = chosen.flatten()
    counts = torch.bincount(flat, minlength=len(down)).tolist()[: len(down)]
    places = flat.sort(stable=True).indices[: sum(counts)]
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights, gate_up, down))
    return _Mixture.apply(x, weights, gate_up, down, bias, gated, places, counts, wanted)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        bias: Tensor | None,
        gated: Gated,
        places: Tensor,
        counts: list[int],
        wanted: bool,
    ) -> Tensor:
        tokens, w = places // weights.shape[1], weights.flatten()[places, None]
        y = torch.zeros_like(x)
        kept = x.new_empty(len(places) if wanted else max(counts, default=0), gate_up.shape[1])
        for e, own in _pieces(counts):
            h = kept[own] if wanted else kept[: own.stop - own.start]
            torch.mm(x.index_select(0, tokens[own]), gate_up[e].mT, out=h)
            if bias is not None:
                h += bias[e]
            y.index_add_(0, tokens[own], gated(h).mul_(w[own]) @ down[e].mT)
        ctx.save_for_backward(x, weights, gate_up, down, places, kept)
        ctx.gated, ctx.counts, ctx.has_bias = gated, counts, bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, gate_up, down, places, kept = ctx.saved_tensors
        tokens, w = places // weights.shape[1], weights.flatten()[places, None]
        gx, g_w = torch.zeros_like(x), torch.zeros_like(weights).flatten()
        g_up, g_down = torch.empty_like(gate_up), torch.empty_like(down)
        g_bias = gate_up.new_zeros(gate_up.shape[:2]) if ctx.has_bias else None
        for e in (e for e, n in enumerate(ctx.counts) if n == 0):
            g_up[e], g_down[e] = 0, 0
        for e, own in _pieces(ctx.counts):
            t = tokens[own]
            g = gy.index_select(0, t)
            with torch.enable_grad():
                h = kept[own].requires_grad_()
                a = ctx.gated(h)
            s = g @ down[e]
            g_w[places[own]] = (s * a.detach()).sum(-1)
            torch.mm(g.mT, a.detach() * w[own], out=g_down[e])
            (gh,) = torch.autograd.grad(a, h, s.mul_(w[own]))
            torch.mm(gh.mT, x.index_select(0, t), out=g_up[e])
            gx.index_add_(0, t, gh @ gate_up[e])
            if g_bias is not None:
                g_bias[e] = gh.sum(0)
        return gx, g_w.view_as(weights), g_up, g_down, g_bias, None, None, None, None


def _pieces(counts: list[int]) -> list[tuple[int, slice]]:
    """Experts that were chosen, and where their choices stand among all, sorted by expert."""
    found, start = [], 0
    for e, n in enumerate(counts):
        if n:
            found.append((e, slice(start, start + n)))
        start += n
    return found


def reference(
    x: Float[Tensor, "T D"],
    chosen: Int[Tensor, "T k"],
    weights: Float[Tensor, "T k"],
    gate_up: Float[Tensor, "E F2 D"],
    down: Float[Tensor, "E D F"],
    gated: Gated,
    bias: Float[Tensor, "E F2"] | None = None,
) -> Float[Tensor, "T D"]:
    """Token by token, choice by choice."""
    rows = []
    for x_t, own, w in zip(x, chosen.tolist(), weights):
        y = torch.zeros_like(x_t)
        for e, w_e in ((e, w_e) for e, w_e in zip(own, w) if e < len(down)):
            h = gate_up[e] @ x_t + (0 if bias is None else bias[e])
            y = y + w_e * (down[e] @ gated(h[None])[0])
        rows.append(y)
    return torch.stack(rows) if rows else torch.zeros_like(x)


def expert_mlp_flops(choices: float, d_model: int, d_expert: int) -> float:
    return 6.0 * choices * d_model * d_expert
