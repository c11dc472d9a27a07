"""Token shift: every projection of RWKV reads a blend of this token and the one before it, channel by channel.

Peng et al. 2023, arXiv:2305.13048, sec. 3.1. The state is the last token's input.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from slipstream.core.state import Slot


def shift_slot(d_model: int) -> Slot:
    """The last input, in the activations' dtype."""
    return Slot((1, d_model), dtype=None)


def after(last: Float[Tensor, "B 1 D"], x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T1 D"]:
    """x behind the token before it: without its last row, the previous inputs; its last row is the next `last`."""
    return torch.cat([last.to(x.dtype), x], 1)


def blend(x: Float[Tensor, "B T D"], previous: Float[Tensor, "B T D"], mu: Tensor) -> Float[Tensor, "B T D"]:
    """x where mu is 0, the previous token where it is 1."""
    return torch.addcmul(x, previous - x, mu)


def ramp(d_model: int, power: float) -> Float[Tensor, "1 1 D"]:
    """From 0 in the first channel to nearly 1 in the last: where RWKV-LM starts."""
    return (torch.arange(d_model) / d_model).pow(power).expand(1, 1, d_model).clone()
