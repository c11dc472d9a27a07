r"""RWKV-4's weighted mean of values (WKV): weights fade by channel, and the token at hand has one of its own.

    y_t = (a_{t-1} + e^{u + k_t} v_t) / (b_{t-1} + e^{u + k_t})
    a_t = e^{-w} a_{t-1} + e^{k_t} v_t        b_t = e^{-w} b_{t-1} + e^{k_t}

Peng et al. 2023, arXiv:2305.13048, eq. 16 and appendix. The state is a and b divided by e^p, and p, the largest exponent so far:
keys have no bound, and nothing may overflow.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.ops.dispatch import operator
from slipstream.ops.linear_scan import linear_scan
from slipstream.ops.valid import valid_mask

LEAST = -1e30  # p before the first token: finite, so that differences are numbers
Sums = tuple[Float[Tensor, "B D"], Float[Tensor, "B D"], Float[Tensor, "B D"]]  # a e^-p, b e^-p, p


@operator("k", "v")
def wkv_scan(
    k: Float[Tensor, "B T D"],
    v: Float[Tensor, "B T D"],
    w: Float[Tensor, "D"],
    u: Float[Tensor, "D"],
    state: Sums,
    lengths: Int[Tensor, "B"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Sums]:
    """y, and the state after each row's last token. w > 0: how much a weight's logarithm falls from token to token."""
    num, den, top = state
    tops = torch.cat([top[:, None], _running_maximum(k.detach(), w.detach(), top, lengths)], 1)
    fall, write = (tops[:, :-1] - w - tops[:, 1:]).exp(), (k - tops[:, 1:]).exp()
    start = torch.stack([num, den], 1)
    both = fall[:, :, None].expand(-1, -1, 2, -1)
    sums, last = linear_scan(both, torch.stack([write * v, write], 2), start, lengths)
    before = torch.cat([start[:, None], sums], 1)[:, :-1]
    own = u + k
    high = torch.maximum(tops[:, :-1], own).detach()
    past, now = (tops[:, :-1] - high).exp(), (own - high).exp()
    y = (past * before[:, :, 0] + now * v) / (past * before[:, :, 1] + now)
    return y, (last[:, 0], last[:, 1], tops[:, -1])


def _running_maximum(k: Tensor, w: Tensor, top: Tensor, lengths: Tensor | None) -> Float[Tensor, "B T D"]:
    """p_t = max(p_{t-1} - w, k_t), by a maximum of what is undone by the decay: it scales both sums, and cancels.

    Padding has no decay and no key, so that p stays.
    """
    gone = w.expand(k.shape)
    if lengths is not None:
        real = valid_mask(lengths, k.shape[1])[..., None]
        k, gone = k.masked_fill(~real, LEAST), gone * real
    gone = gone.cumsum(1)
    return torch.cat([top[:, None], k + gone], 1).cummax(1).values[:, 1:] - gone


def reference(
    k: Float[Tensor, "B T D"], v: Float[Tensor, "B T D"], w: Float[Tensor, "D"], u: Float[Tensor, "D"], state: Sums
) -> tuple[Float[Tensor, "B T D"], Sums]:
    """The definition, token by token, with sums as they are: for keys of moderate size."""
    num, den, top = state
    a, b, outs = num * top.exp(), den * top.exp(), []
    for t in range(k.shape[1]):
        own = (u + k[:, t]).exp()
        outs.append((a + own * v[:, t]) / (b + own))
        a, b = (-w).exp() * a + k[:, t].exp() * v[:, t], (-w).exp() * b + k[:, t].exp()
    return (torch.stack(outs, 1) if outs else v), (a, b, torch.zeros_like(a))
