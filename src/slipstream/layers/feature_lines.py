"""Attention by features over a mixer's lines: the mean of all values so far under the weights phi(q) . phi(k).

What differs between its mixers is given: the features of q and k by heads, and how fast the sums fade, if they do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.mixer import Mixer
from slipstream.core.state import State
from slipstream.layers.lines import lines_reference, run_lines
from slipstream.ops.normalised_scan import normalised_scan, normalised_step
from slipstream.ops.normalised_scan import reference as normalised_reference

EPS = 1e-6  # added to the sum of the weights
Features = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # q, k (B T H K) -> phi(q), phi(k) (B T H R)


def wide_heads(lines: dict[str, Tensor], n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v by heads, in float32 at least: features are summed over everything."""
    wide = torch.promote_types(lines["q"].dtype, torch.float32)
    q, k, v = (lines[n].to(wide).unflatten(-1, (n_heads, -1)) for n in "qkv")
    return q, k, v


def feature_prefill(
    mixer: Mixer,
    n_heads: int,
    chunk_size: int,
    features: Features,
    x: Float[Tensor, "B T D"],
    state: State,
    lengths: Int[Tensor, "B"] | None,
    log_decay: Float[Tensor, "B T H"] | None = None,
    eps: float = EPS,
) -> tuple[Float[Tensor, "B T V"], State]:
    """Outputs of all heads, side by side, and the state after each row's last token (slot S, and those of the lines)."""
    lines, convs = run_lines(mixer, "qkv", x, state, lengths)
    q, k, v = wide_heads(lines, n_heads)
    o, S = normalised_scan(*features(q, k), v, log_decay, state["S"], lengths, eps, chunk_size)
    return o.flatten(2).to(x.dtype), state.advance(x.shape[1] if lengths is None else lengths, S=S, **convs)


def feature_one(
    mixer: Mixer,
    n_heads: int,
    features: Features,
    x: Float[Tensor, "B 1 D"],
    state: State,
    log_decay: Float[Tensor, "B 1 H"] | None = None,
    eps: float = EPS,
) -> tuple[Float[Tensor, "B 1 V"], State]:
    """One token of feature_prefill."""
    lines, convs = run_lines(mixer, "qkv", x, state, None)
    q, k, v = wide_heads(lines, n_heads)
    o, S = normalised_step(*features(q, k), v, log_decay, state["S"], eps)
    return o.flatten(2).to(x.dtype), state.advance(1, S=S, **convs)


def feature_reference(
    mixer: Mixer,
    n_heads: int,
    features: Features,
    x: Float[Tensor, "B T D"],
    log_decay: Float[Tensor, "B T H"] | None = None,
    eps: float = EPS,
) -> Float[Tensor, "B T V"]:
    """The same token by token, with S and z each by itself."""
    q, k, v = wide_heads(lines_reference(mixer, "qkv", x), n_heads)
    return normalised_reference(*features(q, k), v, log_decay, eps=eps)[0].flatten(2).to(x.dtype)
