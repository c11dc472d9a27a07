r"""minLSTM: an LSTM whose gates see the token alone, and which shares out 1 between keeping and writing.

    f_t, i_t = sigmoid(W_f u_t), sigmoid(W_i u_t)         n_t = g(W_h u_t)      g(a) = a + 0.5 where a >= 0, sigmoid(a) elsewhere
    h_t = (f_t * h_{t-1} + i_t * n_t) / (f_t + i_t)       u_t = x_t + conv(x)_t            y_t = W_out h_t

The log-space form of the paper: g keeps the state positive, and there is no output gate and no second state. h starts at
0. W_h, W_f, W_i are the rows of to_hidden_and_gates, without biases, as in minGRU-pytorch; the convolution is that package's
too, where it is a layer of its own before this one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.mixer import Mixer
from slipstream.core.state import Slot, State
from slipstream.layers.min_rnn import MinConfig, MinRNN, positive


class MinLSTM(Mixer, name="minlstm", family="rnn"):
    paper = "Feng, Tung, Ahmed, Bengio & Hajimirsadeghi 2024, arXiv:2410.01201, minLSTM in its log-space form"
    use_when = "as for mingru, where keeping and writing should be learned apart before 1 is shared out between them"
    writes, erases = "i / (f + i) * n", "nothing"
    decays, reads = "f / (f + i): a number a channel, from x", "h itself"
    symbols = {"h~": "n", "f'": "f / (f + i)", "i'": "i / (f + i)", "alpha": "expand"}
    oracle = "minLSTM of minGRU-pytorch 0.2.1 with copied weights, tests/oracles/test_linear_rnn_oracles.py"

    class Config(MinConfig):
        pass

    config: Config
    tiny = Config(d_model=16, expand=1.5, conv_size=3)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.net = MinRNN(config, n_gates=2)

    def slots(self) -> dict[str, Slot]:
        return self.net.slots()

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        (n, f, i), conv = self.net.project(x, state, lengths)
        y, h = self.net.scan(n, _margin(f, i), state["h"], lengths)
        return y, state.advance(x.shape[1] if lengths is None else lengths, h=h, **conv)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        (n, f, i), conv = self.net.project(x, state)
        y, h = self.net.step(n, _margin(f, i), state["h"])
        return y, state.advance(1, h=h, **conv)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        n, f, i = self.net.project_reference(x)
        h, hs = x.new_zeros(x.shape[0], self.net.d_inner), []
        for t in range(x.shape[1]):
            f_t, i_t = torch.sigmoid(f[:, t]), torch.sigmoid(i[:, t])
            h = (f_t * h + i_t * positive(n[:, t])) / (f_t + i_t)
            hs.append(h)
        return self.net.to_out(torch.stack(hs, 1))


def _margin(f: Tensor, i: Tensor) -> Tensor:
    """log f_t - log i_t, whose sigmoid is f / (f + i): the quotient itself is lost where both are near 0."""
    return F.logsigmoid(f) - F.logsigmoid(i)
