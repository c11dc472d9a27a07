r"""Reversible residual layers: training keeps the last activations alone, and makes all others again from them.

    y1 = x1 + f(x2)        y2 = x2 + g(y1)
    x2 = y2 - g(y1)        x1 = y1 - f(x2)

Gomez et al. 2017, arXiv:1707.04585, sec. 3; in Transformers, f attention and g the feed-forward: Kitaev et al. 2020
(Reformer), arXiv:2001.04451, sec. 3. Both write to the stream that is not read, and the streams change places: one line,
(a, b) -> (b, a + f(b)), for any number of layers of any kind. Memory for activations is that of one layer, whatever the
depth; the price is that every layer is computed once more.

Not supported: a layer that draws random numbers or leaves anything behind in its forward (dropout, auxiliary losses), for
it is run twice and would differ; and gradients of gradients. What is made again differs from what was there by rounding:
streams are best float32, as they are under autocast; a model cast to bfloat16 as a whole loses digits with every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream.core.auxiliary import refused

WHY = (
    "a mixture of experts cannot be trained in reversible layers: they run twice and keep nothing, and the losses that balance "
    "experts would reach no layer before them; choose reversible=false, or another feed-forward"
)
Streams = tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]]


@dataclass(frozen=True)
class Layer:
    """A function of the stream that is read, and the parameters in it."""

    run: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor]


def reversibly(layers: Sequence[Layer], a: Float[Tensor, "B T D"], b: Float[Tensor, "B T D"]) -> Streams:
    """(a, b) -> (b, a + f(b)) for each f, with the gradients of just that."""
    wanted = {id(p): p for layer in layers for p in layer.parameters if p.requires_grad}
    with refused(WHY):
        return _Reversible.apply(layers, a, b, *wanted.values())


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: Sequence[Layer], a: Tensor, b: Tensor, *parameters: Tensor) -> Streams:
        ctx.layers, ctx.parameters, ctx.precision = layers, parameters, _precision(a.device.type)
        for layer in layers:
            a, b = b, a + _again(layer, b, ctx.precision)[1].detach()
        ctx.save_for_backward(a, b)
        return a, b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, da: Tensor, db: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        # laid down before the layers' large temporaries: between them, they would leave holes, and a heap that grows with depth
        total, reached = {id(p): torch.zeros_like(p) for p in ctx.parameters}, set()
        for layer in reversed(ctx.layers):
            x, y = _again(layer, a, ctx.precision)
            parameters = [p for p in layer.parameters if p.requires_grad]
            dx, *found = torch.autograd.grad(y, (x, *parameters), db, allow_unused=True)
            for p, grad in zip(parameters, found):
                if grad is not None:
                    total[id(p)] += grad
                    reached.add(id(p))
            a, b, da, db = b - y.detach(), a, db, da + dx
        return None, da, db, *(grad if p in reached else None for p, grad in total.items())


def _again(layer: Layer, x: Tensor, precision: torch.autocast) -> tuple[Tensor, Tensor]:
    """What a layer reads, as a leaf, and what it then writes. The first time too is made as for gradients: the same
    code at the same precision, so that the second time gives the same numbers."""
    x = x.detach().requires_grad_()
    with torch.enable_grad(), precision:
        return x, layer.run(x).to(x.dtype)


def _precision(device: str) -> torch.autocast:
    """What holds now, for the backward pass too. Without autocast's cache of weights, which would hold some that were cast
    where gradients were off."""
    dtype, on = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return torch.autocast(device, dtype=dtype, enabled=on, cache_enabled=False)
