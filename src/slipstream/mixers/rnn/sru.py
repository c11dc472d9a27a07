r"""SRU: matrix products on the tokens alone; between tokens only numbers, one channel at a time.

    f_t = sigmoid(W_f x_t + v_f * c_{t-1} + b_f)          c_t = f_t * c_{t-1} + (1 - f_t) * W x_t
    r_t = sigmoid(W_r x_t + v_r * c_{t-1} + b_r)          h_t = r_t * c_t + (1 - r_t) * alpha x_t

The gates see the last state, elementwise, so the recurrence is not linear and time cannot be run in parallel: it is a loop
of three cheap passes a token. alpha = sqrt(1 + 2 exp(highway_bias)) keeps the variance through layers; it is fixed.
Weights are laid out as in the authors' package sru (weight: D by 3D, the three numbers of a channel side by side; weight_c:
v_f, v_r; bias: b_f, b_r). Its optional tanh, projections and dropout are left out.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.ops.peephole_scan import peephole_scan, peephole_step


class SRU(Mixer, name="sru", family="rnn"):
    paper = "Lei, Zhang, Wang, Dai & Artzi 2018, arXiv:1709.02755; initialisation: the authors' package sru"
    use_when = "an LSTM would do but takes too long, and channels need not meet inside the recurrence"
    writes, erases = "(1 - f) * W x", "nothing"
    decays, reads = "f: a number a channel, from x and c", "r * c + (1 - r) * alpha x"
    symbols = {"v_f, v_r": "weight_c", "b_f, b_r": "bias", "alpha": "scale_x"}
    oracle = "golden arrays of a loop in numpy, and sru 2.6.0, tests/oracles/test_linear_rnn_oracles.py"
    no_weight_decay = ("weight_c", "bias")

    class Config(MixerConfig):
        highway_bias: float = 0.0  # start of b_r: below 0, more of the input passes by

    config: Config
    tiny = Config(d_model=16, highway_bias=-0.5)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D = config.d_model
        self.scale_x = math.sqrt(1 + 2 * math.exp(config.highway_bias))
        self.weight = nn.Parameter(torch.empty(D, 3 * D).uniform_(-((3 / D) ** 0.5), (3 / D) ** 0.5))
        self.weight_c = nn.Parameter(torch.empty(2 * D).uniform_(-(1.5**0.5), 1.5**0.5))
        self.bias = nn.Parameter(torch.cat([torch.zeros(D), torch.full((D,), config.highway_bias)]))
        with torch.no_grad():
            self.weight.unflatten(1, (D, 3))[..., 1:] *= (
                0.5**0.5
            )  # a gate is a sum of two terms, one of them the state's

    def slots(self) -> dict[str, Slot]:
        return {"c": Slot((self.config.d_model,))}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        u, f, r = self._projected(x)
        v_f, v_r = self.weight_c.chunk(2)
        c, last = peephole_scan(u, f, v_f, state["c"], lengths)
        before = torch.cat([state["c"][:, None], c], 1)[:, :-1]
        return self._out(x, c, r + v_r * before), state.advance(x.shape[1] if lengths is None else lengths, c=last)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        u, f, r = self._projected(x[:, 0])
        v_f, v_r = self.weight_c.chunk(2)
        c = peephole_step(u, f, v_f, state["c"])
        return self._out(x, c[:, None], (r + v_r * state["c"])[:, None]), state.advance(1, c=c)

    def _projected(self, x: Float[Tensor, "*B D"]) -> tuple[Tensor, Tensor, Tensor]:
        """What the tokens alone say: candidate, forget gate, reset gate, biases added."""
        u, f, r = (x @ self.weight).unflatten(-1, (-1, 3)).unbind(-1)
        b_f, b_r = self.bias.chunk(2)
        return u, f + b_f, r + b_r

    def _out(self, x: Tensor, c: Tensor, r: Tensor) -> Tensor:
        skip = self.scale_x * x
        return torch.lerp(skip.to(c.dtype), c, torch.sigmoid(r)).to(x.dtype)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        W, W_f, W_r = self.weight.unflatten(1, (-1, 3)).unbind(2)
        (v_f, v_r), (b_f, b_r) = self.weight_c.chunk(2), self.bias.chunk(2)
        c, hs = x.new_zeros(x.shape[0], self.config.d_model), []
        for t in range(x.shape[1]):
            x_t = x[:, t]
            f = torch.sigmoid(x_t @ W_f + v_f * c + b_f)
            r = torch.sigmoid(x_t @ W_r + v_r * c + b_r)
            c = f * c + (1 - f) * (x_t @ W)
            hs.append(r * c + (1 - r) * self.scale_x * x_t)
        return torch.stack(hs, 1)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return 2.0 * (B if mode == "step" else B * T) * self.weight.numel()
