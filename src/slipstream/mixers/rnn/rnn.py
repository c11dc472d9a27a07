r"""Elman network: one tanh layer that is fed its own last output, the plain recurrent net that all others improve on.

    h_t = tanh(W x_t + b + U h_{t-1} + b')

Here as a contrast: gradients through T tokens are products of T matrices, so they vanish or explode, and what was read long
ago is lost. U starts orthogonal, which puts that off; all else is torch.nn.RNN, whose names and layout the weights have.
One layer, one direction; where d_hidden differs from d_model an output projection leads back.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.recurrent_weights import add_recurrent_weights, recurrent_weights
from slipstream.ops.nonlinear_scan import nonlinear_scan_flops, rnn_reference, rnn_scan, rnn_step


class RNN(Mixer, name="rnn", family="rnn"):
    paper = "Elman 1990, Cognitive Science 14(2), Finding structure in time"
    use_when = "a baseline is wanted that shows what gates are for, or the last few tokens are all that matters"
    writes, erases = "W x, inside the tanh", "nothing"
    decays, reads = "all of it, mixed by U and squashed", "h itself"
    symbols = {"h": "slot h", "W": "weight_ih_l0", "U": "weight_hh_l0"}
    oracle = "torch.nn.RNN, tests/oracles/test_linear_rnn_oracles.py"

    class Config(MixerConfig):
        d_hidden: int | None = None  # width of the hidden state; default d_model

    config: Config
    tiny = Config(d_model=16, d_hidden=24)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.d_hidden = config.d_hidden or config.d_model
        add_recurrent_weights(self, 1, self.d_hidden)
        nn.init.orthogonal_(self.get_parameter("weight_hh_l0"))
        same = self.d_hidden == config.d_model
        self.out_proj = nn.Identity() if same else Linear(self.d_hidden, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        return {"h": Slot((self.d_hidden,))}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        y, h = rnn_scan(x, recurrent_weights(self), state["h"], lengths)
        return self.out_proj(y), state.advance(x.shape[1] if lengths is None else lengths, h=h)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        h = rnn_step(x[:, 0], recurrent_weights(self), state["h"])
        return self.out_proj(h.to(x.dtype))[:, None], state.advance(1, h=h)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.out_proj(rnn_reference(x, recurrent_weights(self), x.new_zeros(x.shape[0], self.d_hidden))[0])

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return nonlinear_scan_flops(B if mode == "step" else B * T, 1, self.config.d_model, self.d_hidden)
