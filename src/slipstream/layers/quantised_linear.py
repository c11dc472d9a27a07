"""A projection whose matrix is kept in 8 or 4 bits a weight. It runs; it is not trained."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.layers.linear import Linear
from slipstream.ops.quantised_linear import Bits, dequantise, dequantise_rows, pack, packed_shapes, quantised_linear


class QuantisedLinear(Linear):
    """y = x W^T + bias, W from codes and scales (see ops/quantised_linear.py): buffers, so that no optimiser finds them.

    A Linear to whoever counts or reads it: `weight` makes the matrix again, at every reading.
    """

    like: Tensor  # of the dtype of what comes in and goes out
    codes: Tensor
    scales: Tensor

    def __init__(self, inputs: int, outputs: int, bits: Bits, group: int = 32, bias: bool = False) -> None:
        """All zeros, for a checkpoint to fill."""
        nn.Module.__init__(self)  # no matrix of torch's
        self.in_features, self.out_features = inputs, outputs
        codes, scales = packed_shapes(outputs, inputs, bits, group)
        self.register_buffer("like", torch.empty(0), persistent=False)
        self.register_buffer("codes", torch.zeros(codes, dtype=torch.int8 if bits == 8 else torch.uint8))
        self.register_buffer("scales", torch.zeros(scales, dtype=torch.float16))
        self.bias = nn.Parameter(torch.zeros(outputs), requires_grad=False) if bias else None  # type: ignore[assignment]

    @classmethod
    def of(
        cls, weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None, bits: Bits, group: int = 32
    ) -> QuantisedLinear:
        """The nearest to a matrix. Raises InputError when that has weights that are no numbers."""
        with torch.device("meta"):
            made = cls(weight.shape[1], weight.shape[0], bits, group)
        made.like = weight.detach().new_empty(0)
        made.codes, made.scales = pack(weight, bits, group)
        made.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)  # type: ignore[assignment]
        return made

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def weight(self) -> Float[Tensor, "O I"]:  # type: ignore[override]
        return dequantise(self.codes, self.scales, self.out_features, self.in_features, self.dtype)

    def rows(self, index: Int[Tensor, "*A"]) -> Float[Tensor, "*A I"]:
        """Some rows of the matrix."""
        return dequantise_rows(self.codes, self.scales, index, self.in_features, self.dtype)

    def forward(self, x: Float[Tensor, "*A I"]) -> Float[Tensor, "*A O"]:  # type: ignore[override]
        return quantised_linear(x, self.codes, self.scales, self.out_features, self.bias)

    def _apply(self, fn, recurse=True):
        """Moved, scales go along; cast, they stay float16, for codes mean nothing beside others."""
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = self.scales if self.scales.dtype == scales.dtype else scales.to(self.scales.device)
        return self
