r"""Double-gated short convolution of LFM2: the only mixer of most layers of a small model that is to be fast on phones.

    B, C, x = W_in u        y = W_out (C * conv(B * x))        conv(h)_t = sum_{i<W} w_i * h_{t-W+1+i}

It sees W tokens and nothing before them; a gate of its input decides what enters, another what leaves. Far tokens are for the
layers between: LFM2 has a softmax layer after every two or three of these, as in the pattern "2*lfm2_conv, attention". Weights
are named as in transformers' Lfm2ShortConv.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from slipstream.core.config import MixerConfig
from slipstream.core.mixer import Mixer
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.short_conv import ShortConv


class LFM2Conv(Mixer, name="lfm2_conv", family="conv"):
    paper = "Liquid AI 2025, LFM2 Technical Report, arXiv:2511.23404; as in transformers' Lfm2ShortConv"
    use_when = "small models on small devices, where a few layers of attention do all that is far away"
    writes, erases = "B * x, beside its last inputs", "nothing"
    decays, reads = "what leaves the W taps, all at once", "C * sum_i w_i * h"
    symbols = {"W": "conv_size", "B, C, x": "thirds of in_proj", "w": "conv.weight"}
    oracle = "transformers Lfm2ShortConv, tests/oracles/test_hybrid_oracles.py"

    class Config(MixerConfig):
        conv_size: int = Field(3, ge=1)  # taps of the convolution
        bias: bool = False  # biases on the projections and on the convolution

    config: Config
    tiny = Config(d_model=16, conv_size=3, bias=True)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D = config.d_model
        self.in_proj = Linear(D, 3 * D, bias=config.bias)
        self.conv = ShortConv(D, config.conv_size, bias=config.bias, activation=False)
        self.out_proj = Linear(D, D, bias=config.bias)

    def slots(self) -> dict[str, Slot]:
        return {"conv": self.conv.slot()}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        B, C, x = self.in_proj(x).chunk(3, -1)
        h, conv = self.conv(B * x, state["conv"], lengths)
        return self.out_proj(C * h), state.advance(x.shape[1] if lengths is None else lengths, conv=conv)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        B, C, x = self.in_proj(x).chunk(3, -1)
        return self.out_proj(C * self.conv.reference(B * x))
