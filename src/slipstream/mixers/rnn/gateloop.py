r"""GateLoop: linear attention with one channel a head, whose state turns and fades by complex numbers read from the token.

    a_t = sigmoid(W_alpha x_t + b) exp(i (W_beta x_t + b'))          q, k, v = W x_t
    h_t = a_t * h_{t-1} + k_t * v_t                                  y_t = W_o (silu(W_g x_t) * q_t * Re(h_t))

The paper's operator has a matrix state a head; its models have as many heads as channels, which makes the state a vector, and
that is what is here. Magnitude by sigmoid and phase as it is are the paper's. So that a fresh model remembers, the
magnitudes' biases start evenly between 0.5 and 0.998, and both projections of a at a tenth of the usual size, since phases that
jump at random erase; the paper lowers their learning rate instead.
"""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from slipstream.core.config import MixerConfig
from slipstream.core.mixer import Mixer
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.ops.linear_scan import linear_scan
from slipstream.ops.silu_gate import silu_gate


class GateLoop(Mixer, name="gateloop", family="rnn"):
    paper = "Katsch 2023, arXiv:2311.01927, section 3, maximally headed"
    use_when = (
        "text must do with a very small state, and how fast and in which phase it forgets should follow the content"
    )
    writes, erases = "k * v", "nothing"
    decays, reads = "|a|: a number a channel, from x, which also turns", "q * Re(h)"
    symbols = {"a": "decay", "alpha": "the first half of a_proj", "beta": "the second half of a_proj"}
    oracle = "gate_loop_operator of gateloop-transformer 0.2.5, tests/oracles/test_linear_rnn_oracles.py"

    class Config(MixerConfig):
        d_inner: int | None = None  # channels of the state; default d_model

    config: Config
    tiny = Config(d_model=16, d_inner=24)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.d_inner = config.d_inner or config.d_model
        self.qkv_proj = Linear(config.d_model, 3 * self.d_inner, bias=False)
        self.a_proj = Linear(config.d_model, 2 * self.d_inner)
        self.g_proj = Linear(config.d_model, self.d_inner, bias=False)
        self.o_proj = Linear(self.d_inner, config.d_model, bias=False)
        with torch.no_grad():
            self.a_proj.weight *= 0.1
            self.a_proj.bias.copy_(torch.cat([torch.linspace(0, 6, self.d_inner), torch.zeros(self.d_inner)]))

    def slots(self) -> dict[str, Slot]:
        return {"h": Slot((self.d_inner,), dtype=torch.complex64)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        q, k, v = self.qkv_proj(x).chunk(3, -1)
        h, last = linear_scan(self._decay(x), k * v, state["h"], lengths)
        return self._out(x, q, h), state.advance(x.shape[1] if lengths is None else lengths, h=last)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        q, k, v = self.qkv_proj(x).chunk(3, -1)
        h = self._decay(x) * state["h"][:, None] + k * v
        return self._out(x, q, h), state.advance(1, h=h[:, 0])

    def _decay(self, x: Float[Tensor, "B T D"]) -> Complex[Tensor, "B T H"]:
        alpha, beta = self.a_proj(x).to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
        return torch.polar(torch.sigmoid(alpha), beta)

    def _out(self, x: Tensor, q: Tensor, h: Complex[Tensor, "B T H"]) -> Tensor:
        return self.o_proj(silu_gate(q * h.real.to(x.dtype), self.g_proj(x)))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self.qkv_proj(x).chunk(3, -1)
        alpha, beta = self.a_proj(x).chunk(2, -1)
        a = torch.sigmoid(alpha) * torch.exp(1j * beta)
        h, hs = torch.zeros_like(a[:, 0]), []
        for t in range(x.shape[1]):
            h = a[:, t] * h + k[:, t] * v[:, t]
            hs.append(h)
        return self._out(x, q, torch.stack(hs, 1))
