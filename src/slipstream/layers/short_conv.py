"""The width-4 depthwise convolution before q, k, v: it hands every token its neighbours, which recall depends on."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.state import Slot
from slipstream.ops.causal_conv import causal_conv


class ShortConv(nn.Conv1d):
    """Depthwise causal convolution with SiLU. Weights are named and shaped as nn.Conv1d's (D 1 W), as checkpoints have them.

    The state is the last W-1 inputs, in the activations' dtype.
    """

    def __init__(self, width: int, conv_size: int = 4, bias: bool = False, activation: bool = True) -> None:
        super().__init__(width, width, conv_size, groups=width, bias=bias)
        self.activation = activation

    def slot(self) -> Slot:
        return Slot((self.kernel_size[0] - 1, self.in_channels), dtype=None)

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "B T D"], state: Float[Tensor, "B P D"], lengths: Int[Tensor, "B"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B P D"]]:
        return causal_conv(x, self.weight[:, 0], self.bias, state, lengths, self.activation)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The same by torch's own convolution, over a left-padded sequence."""
        padded = F.pad(x.mT, (self.kernel_size[0] - 1, 0))
        y = F.conv1d(padded, self.weight, self.bias, groups=self.groups).mT
        return F.silu(y) if self.activation else y
