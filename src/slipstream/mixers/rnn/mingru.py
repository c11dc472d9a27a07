r"""minGRU: a GRU whose gate and candidate see the token alone, so that time is one linear scan.

    z_t = sigmoid(W_z u_t)        n_t = g(W_h u_t)        g(a) = a + 0.5 where a >= 0, sigmoid(a) elsewhere
    h_t = (1 - z_t) * h_{t-1} + z_t * n_t                 u_t = x_t + conv(x)_t            y_t = W_out h_t

The log-space form of the paper: g keeps the state positive. h starts at 0. W_h over W_z are the rows of to_hidden_and_gates,
without biases, as in minGRU-pytorch; the convolution is that package's too, where it is a layer of its own before this
one. The gate never sees the state, so no state is tracked that depends on order alone (parity).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.mixer import Mixer
from slipstream.core.state import Slot, State
from slipstream.layers.min_rnn import MinConfig, MinRNN, positive


class MinGRU(Mixer, name="mingru", family="rnn"):
    paper = "Feng, Tung, Ahmed, Bengio & Hajimirsadeghi 2024, arXiv:2410.01201, minGRU in its log-space form"
    use_when = (
        "the smallest recurrence that trains in parallel is wanted: sensors, control, short text on small machines"
    )
    writes, erases = "z * n", "nothing"
    decays, reads = "1 - z: a number a channel, from x", "h itself"
    symbols = {"h~": "n", "z": "z", "alpha": "expand"}
    oracle = "minGRU of minGRU-pytorch 0.2.1 with copied weights, tests/oracles/test_linear_rnn_oracles.py"

    class Config(MinConfig):
        pass

    config: Config
    tiny = Config(d_model=16, expand=1.5, conv_size=3)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.net = MinRNN(config, n_gates=1)

    def slots(self) -> dict[str, Slot]:
        return self.net.slots()

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        (n, z), conv = self.net.project(x, state, lengths)
        y, h = self.net.scan(n, -z, state["h"], lengths)
        return y, state.advance(x.shape[1] if lengths is None else lengths, h=h, **conv)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        (n, z), conv = self.net.project(x, state)
        y, h = self.net.step(n, -z, state["h"])
        return y, state.advance(1, h=h, **conv)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        n, z = self.net.project_reference(x)
        h, hs = x.new_zeros(x.shape[0], self.net.d_inner), []
        for t in range(x.shape[1]):
            z_t = torch.sigmoid(z[:, t])
            h = (1 - z_t) * h + z_t * positive(n[:, t])
            hs.append(h)
        return self.net.to_out(torch.stack(hs, 1))
