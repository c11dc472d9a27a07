r"""What minGRU and minLSTM share (Feng et al. 2024, arXiv:2410.01201): everything but the gate.

    h_t = a_t * h_{t-1} + (1 - a_t) * g(W_h u_t)      u_t = x_t + conv(x)_t      g(n) = n + 0.5 where n >= 0, else sigmoid(n)

a_t = sigmoid(margin), and the margin is what the two differ in. The paper runs this on logarithms, so that a parallel scan is
stable; all terms being positive, the plain sum is the same number.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.short_conv import ShortConv
from slipstream.ops.linear_scan import linear_scan


class MinConfig(MixerConfig):
    """Settings of both."""

    expand: float = 1.5  # width of the state as a multiple of d_model
    conv_size: int = 4  # width of the short convolution before the gates; 0 for none


class MinRNN(nn.Module):
    """The convolution beside its input (depthwise, with a bias, no activation), all projections, and the recurrence."""

    def __init__(self, config: MinConfig, n_gates: int) -> None:
        super().__init__()
        self.d_inner = round(config.d_model * config.expand)
        self.conv1d = ShortConv(config.d_model, config.conv_size, True, activation=False) if config.conv_size else None
        self.to_hidden_and_gates = Linear(config.d_model, (1 + n_gates) * self.d_inner, bias=False)
        self.to_out = Linear(self.d_inner, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        return {"h": Slot((self.d_inner,))} | ({"conv": self.conv1d.slot()} if self.conv1d else {})

    def project(
        self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """W_h u and the gates before their sigmoid, in float32 at least, and the convolution's new state."""
        conv = {}
        if self.conv1d:
            y, conv["conv"] = self.conv1d(x, state["conv"], lengths)
            x = x + y
        return self._split(x), conv

    def project_reference(self, x: Float[Tensor, "B T D"]) -> list[Tensor]:
        return self._split(x + self.conv1d.reference(x) if self.conv1d else x)

    def _split(self, u: Tensor) -> list[Tensor]:
        wide = torch.promote_types(u.dtype, torch.float32)
        return list(self.to_hidden_and_gates(u).to(wide).split(self.d_inner, -1))

    def scan(self, n: Tensor, margin: Tensor, h: Tensor, lengths: Int[Tensor, "B"] | None) -> tuple[Tensor, Tensor]:
        """Outputs and the last state."""
        hs, last = linear_scan(torch.sigmoid(margin), torch.sigmoid(-margin) * positive(n), h, lengths)
        return self.to_out(hs.to(self.to_out.dtype)), last

    def step(self, n: Float[Tensor, "B 1 H"], margin: Tensor, h: Float[Tensor, "B H"]) -> tuple[Tensor, Tensor]:
        """The output and the state of one token."""
        h = torch.lerp(positive(n), h[:, None], torch.sigmoid(margin))
        return self.to_out(h.to(self.to_out.dtype)), h[:, 0]


def positive(n: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """g: continuous, increasing, and above 0."""
    return torch.where(n >= 0, n + 0.5, torch.sigmoid(n))
