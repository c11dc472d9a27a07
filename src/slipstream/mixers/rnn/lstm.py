r"""Long short-term memory: an input, a forget and an output gate that see the last hidden state.

    i_t, f_t, o_t = sigmoid(W x_t + U h_{t-1} + b)      n_t = tanh(W_n x_t + U_n h_{t-1} + b_n)
    c_t = f_t * c_{t-1} + i_t * n_t                     h_t = o_t * tanh(c_t)

Weights are named and laid out as torch.nn.LSTM's. One layer, one direction, no peepholes; where d_hidden differs from
d_model an output projection leads back. Because the gates read h_{t-1}, time cannot be run in parallel.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.recurrent_weights import add_recurrent_weights, recurrent_weights
from slipstream.ops.nonlinear_scan import lstm_reference, lstm_scan, lstm_step, nonlinear_scan_flops


class LSTM(Mixer, name="lstm", family="rnn"):
    paper = "Hochreiter & Schmidhuber 1997, Neural Computation 9(8); forget gate: Gers et al. 2000, ibid. 12(10)"
    use_when = "state must be tracked exactly over short or middling streams (parity, counters); training time is cheap"
    writes, erases = "i * n, with n from x and h", "nothing"
    decays, reads = "a number a channel, from x and h", "o * tanh(c)"
    symbols = {"c": "slot c", "h": "slot h", "g": "n", "W": "weight_ih_l0", "U": "weight_hh_l0"}
    oracle = "torch.nn.LSTM, tests/oracles/test_ssm_rnn_oracles.py"

    class Config(MixerConfig):
        d_hidden: int | None = None  # width of the hidden state; default d_model
        forget_bias: float = 1.0  # start of the forget gate's bias: above 0 it remembers from the first step on

    config: Config
    tiny = Config(d_model=16, d_hidden=24)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.d_hidden = config.d_hidden or config.d_model
        add_recurrent_weights(self, 4, self.d_hidden)
        same = self.d_hidden == config.d_model
        self.out_proj = nn.Identity() if same else Linear(self.d_hidden, config.d_model, bias=False)
        _, _, *biases = recurrent_weights(self)
        for bias, start in zip(biases, (config.forget_bias, 0.0)):
            nn.init.constant_(bias[self.d_hidden : 2 * self.d_hidden], start)

    def slots(self) -> dict[str, Slot]:
        return {"h": Slot((self.d_hidden,)), "c": Slot((self.d_hidden,))}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        y, (h, c) = lstm_scan(x, recurrent_weights(self), (state["h"], state["c"]), lengths)
        return self.out_proj(y), state.advance(x.shape[1] if lengths is None else lengths, h=h, c=c)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        h, c = lstm_step(x[:, 0], recurrent_weights(self), (state["h"], state["c"]))
        return self.out_proj(h.to(x.dtype))[:, None], state.advance(1, h=h, c=c)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        zeros = x.new_zeros(x.shape[0], self.d_hidden)
        return self.out_proj(lstm_reference(x, recurrent_weights(self), (zeros, zeros))[0])

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return nonlinear_scan_flops(B if mode == "step" else B * T, 4, self.config.d_model, self.d_hidden)
