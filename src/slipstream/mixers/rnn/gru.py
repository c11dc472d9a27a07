r"""Gated recurrent unit: two gates and one state, an LSTM with a quarter fewer weights.

    r_t, z_t = sigmoid(W x_t + U h_{t-1} + b)           n_t = tanh(W_n x_t + b_n + r_t * (U_n h_{t-1} + b'_n))
    h_t = (1 - z_t) * n_t + z_t * h_{t-1}

The reset gate acts after the product U_n h, as in torch.nn.GRU, whose names and layout the weights have (and as in the
first version of the paper; the third resets before it). One layer, one direction; where d_hidden differs from d_model
an output projection leads back.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.recurrent_weights import add_recurrent_weights, recurrent_weights
from slipstream.ops.nonlinear_scan import gru_reference, gru_scan, gru_step, nonlinear_scan_flops


class GRU(Mixer, name="gru", family="rnn"):
    paper = "Cho et al. 2014, arXiv:1406.1078, eq. 5-8; reset after the product: torch.nn.GRU"
    use_when = "as lstm, with less memory and fewer weights, on streams where two gates are enough"
    writes, erases = "(1 - z) * n, with n from x and h", "nothing"
    decays, reads = "a number a channel, from x and h", "h itself"
    symbols = {"h": "slot h", "W": "weight_ih_l0", "U": "weight_hh_l0"}
    oracle = "torch.nn.GRU, tests/oracles/test_ssm_rnn_oracles.py"

    class Config(MixerConfig):
        d_hidden: int | None = None  # width of the hidden state; default d_model

    config: Config
    tiny = Config(d_model=16, d_hidden=24)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.d_hidden = config.d_hidden or config.d_model
        add_recurrent_weights(self, 3, self.d_hidden)
        same = self.d_hidden == config.d_model
        self.out_proj = nn.Identity() if same else Linear(self.d_hidden, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        return {"h": Slot((self.d_hidden,))}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        y, h = gru_scan(x, recurrent_weights(self), state["h"], lengths)
        return self.out_proj(y), state.advance(x.shape[1] if lengths is None else lengths, h=h)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        h = gru_step(x[:, 0], recurrent_weights(self), state["h"])
        return self.out_proj(h.to(x.dtype))[:, None], state.advance(1, h=h)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.out_proj(gru_reference(x, recurrent_weights(self), x.new_zeros(x.shape[0], self.d_hidden))[0])

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return nonlinear_scan_flops(B if mode == "step" else B * T, 3, self.config.d_model, self.d_hidden)
