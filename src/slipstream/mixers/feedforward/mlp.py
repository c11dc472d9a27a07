r"""MLP: two layers with a GELU between, each token by itself.

    y = W_down gelu(W_up x)

No dropout; no biases unless asked for.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from slipstream.core.config import MixerConfig
from slipstream.core.per_token import PerToken
from slipstream.layers.activations import ACTIVATIONS, Activation
from slipstream.layers.linear import Linear


class MLP(PerToken, name="mlp", family="feedforward"):
    paper = "Vaswani et al. 2017, arXiv:1706.03762, eq. 2; GELU: Hendrycks & Gimpel 2016, arXiv:1606.08415, eq. 2"
    use_when = "a checkpoint was made with it, or two matrices instead of three suit the hardware"
    symbols = {"W_1": "up_proj", "W_2": "down_proj"}
    oracle = "its own equation with the exact GELU, tests/laws"

    class Config(MixerConfig):
        d_ff: int | None = Field(None, ge=1)  # inner width; default 4 d_model
        activation: Activation = "gelu"  # gelu (the exact one), gelu_tanh, relu, relu2 or silu
        bias: bool = False  # biases on both projections

    config: Config
    tiny = Config(d_model=16, d_ff=24)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        d_ff = config.d_ff or 4 * config.d_model
        self.up_proj = Linear(config.d_model, d_ff, bias=config.bias)
        self.down_proj = Linear(d_ff, config.d_model, bias=config.bias)
        self.activate = ACTIVATIONS[config.activation]

    def transform(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.down_proj(self.activate(self.up_proj(x)))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        a = self.up_proj(x)
        exact = a * (1 + torch.erf(a / 2**0.5)) / 2
        return self.down_proj(exact if self.config.activation == "gelu" else self.activate(a))
