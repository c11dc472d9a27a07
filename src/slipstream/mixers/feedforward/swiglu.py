r"""SwiGLU: a gated feed-forward, each token by itself.

    y = W_down (silu(W_gate x) * (W_up x))

No dropout; no biases unless asked for. With activation gelu_tanh in silu's place it is the GeGLU of Gemma. Falcon-H1 has two
fixed factors, one within the activation and one on y.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from slipstream.core.config import MixerConfig
from slipstream.core.per_token import PerToken
from slipstream.layers.activations import ACTIVATIONS, GATED, Activation
from slipstream.layers.gated_mlp import gated_width
from slipstream.layers.linear import Linear


class SwiGLU(PerToken, name="swiglu", family="feedforward"):
    paper = "Shazeer 2020, arXiv:2002.05202, eq. 6 (FFN_SwiGLU)"
    use_when = "the default feed-forward: better than a plain MLP for the same parameters"
    symbols = {"W": "gate_proj", "V": "up_proj", "W_2": "down_proj"}
    oracle = "transformers LlamaMLP, tests/oracles/test_transformers.py"

    class Config(MixerConfig):
        d_ff: int | None = Field(None, ge=1)  # inner width; default 8/3 d_model, rounded up to a multiple of 16
        activation: Activation = "silu"  # of the gate: silu, gelu, gelu_tanh (GeGLU of Gemma), relu or relu2
        bias: bool = False  # biases on all three projections
        gate_scale: float = 1.0  # factor on W_gate x (Falcon-H1)
        out_scale: float = 1.0  # factor on y (Falcon-H1)

    config: Config
    tiny = Config(d_model=16, d_ff=24)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        d_ff = config.d_ff or gated_width(config.d_model)
        self.gate_proj = Linear(config.d_model, d_ff, bias=config.bias)
        self.up_proj = Linear(config.d_model, d_ff, bias=config.bias)
        self.down_proj = Linear(d_ff, config.d_model, bias=config.bias)
        self.gated = GATED[config.activation]

    def transform(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        y = self.down_proj(self.gated(self.up_proj(x), self._gate(x)))
        return y if self.config.out_scale == 1 else y * self.config.out_scale

    def _gate(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T F"]:
        a = self.gate_proj(x)
        return a if self.config.gate_scale == 1 else a * self.config.gate_scale

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        a, b = self.config.gate_scale * self.gate_proj(x), self.up_proj(x)
        gate = a / (1 + torch.exp(-a)) if self.config.activation == "silu" else ACTIVATIONS[self.config.activation](a)
        return self.config.out_scale * self.down_proj(gate * b)
