r"""MLP: two layers with a GELU between, each token by itself.

    y = W_down gelu(W_up x)

No biases and no dropout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from slipstream.core.config import MixerConfig
from slipstream.core.per_token import PerToken
from slipstream.layers.linear import Linear


class MLP(PerToken, name="mlp", family="feedforward"):
    paper = "Vaswani et al. 2017, arXiv:1706.03762, eq. 2; GELU: Hendrycks & Gimpel 2016, arXiv:1606.08415, eq. 2"
    use_when = "a checkpoint was made with it, or two matrices instead of three suit the hardware"
    symbols = {"W_1": "up_proj", "W_2": "down_proj"}
    oracle = "its own equation with the exact GELU, tests/laws"

    class Config(MixerConfig):
        d_ff: int | None = Field(None, ge=1)  # inner width; default 4 d_model

    tiny = Config(d_model=16, d_ff=24)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        d_ff = config.d_ff or 4 * config.d_model
        self.up_proj = Linear(config.d_model, d_ff, bias=False)
        self.down_proj = Linear(d_ff, config.d_model, bias=False)

    def transform(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.down_proj(F.gelu(self.up_proj(x)))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        a = x @ self.up_proj.weight.T
        return (a * (1 + torch.erf(a / 2**0.5)) / 2) @ self.down_proj.weight.T
