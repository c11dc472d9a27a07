r"""What stands around the recurrence in Mamba's block: a wide projection, a short convolution, a skip and a gate.

    x, z = W_in u        x = silu(conv(x))        o = recurrence(x)        y = W_out ((o + D x) * silu(z))

The weights are the mixer's own, under the names that checkpoints have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.state import State
from slipstream.layers.linear import Linear
from slipstream.layers.short_conv import ShortConv
from slipstream.ops.silu_gate import silu_gate

Gated = Callable[[Tensor, Tensor, Tensor], tuple[Float[Tensor, "B T I"], Float[Tensor, "B I N"]]]  # x, D, z -> gated, h
Recurrence = Callable[[Tensor], tuple[Float[Tensor, "B T I"], Float[Tensor, "B I N"]]]  # x (B T I) -> o, h


@runtime_checkable
class Block(Protocol):
    """A mixer with the block's weights, and the slots h and conv."""

    in_proj: Linear
    conv1d: ShortConv
    D: nn.Parameter
    out_proj: Linear


def through_block(
    block: Block, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None, recurrence: Gated
) -> tuple[Float[Tensor, "B T D"], State]:
    """Outputs and the new state; the recurrence sees to its own entering state, and to skip and gate."""
    x, z = block.in_proj(x).chunk(2, -1)
    x, conv = block.conv1d(x, state["conv"], lengths)
    y, h = recurrence(x, block.D, z)
    return block.out_proj(y), state.advance(x.shape[1] if lengths is None else lengths, h=h, conv=conv)


def one_token(
    step: Callable[[Tensor], tuple[Float[Tensor, "B I"], Float[Tensor, "B I N"]]],
) -> Gated:
    """A recurrence of one token, x (B I) -> o, h, as the block takes it."""

    def gated(x: Float[Tensor, "B 1 I"], D: Tensor, z: Float[Tensor, "B 1 I"]) -> tuple[Tensor, Tensor]:
        o, h = step(x[:, 0])
        return silu_gate(torch.addcmul(o[:, None], D, x), z), h

    return gated


def block_reference(block: Block, x: Float[Tensor, "B T D"], recurrence: Recurrence) -> Float[Tensor, "B T D"]:
    """The same over a whole sequence, by torch's own convolution."""
    x, z = block.in_proj(x).chunk(2, -1)
    x = block.conv1d.reference(x)
    return block.out_proj((recurrence(x)[0] + block.D * x) * F.silu(z))
