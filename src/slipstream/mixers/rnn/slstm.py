r"""sLSTM of xLSTM: an LSTM with an exponential input gate and a normaliser, whose heads mix their own channels only.

    i~, f~ = W conv(x)_t + U h_{t-1} + b         z~, o~ = W x_t + U h_{t-1} + b        (block-diagonal W, U)
    c_t = f_t c_{t-1} + i_t tanh(z~)             n_t = f_t n_{t-1} + i_t               h_t = sigmoid(o~) * c_t / n_t

    i_t = exp(i~)      f_t = sigmoid(f~)         y_t = norm_h(h_t)

c and n are kept times exp(-m), m_t = max(log f_t + m_{t-1}, i~_t). The layer of the authors' package xlstm, where the
forget gate may also be exponential; no output projection, and the feed-forward after it is left to the block around.
Because the gates read h_{t-1} it can track states, and time cannot be run in parallel.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.head_norm import HeadNorm
from slipstream.layers.short_conv import ShortConv
from slipstream.ops.slstm_scan import SLSTMState, slstm_flops, slstm_scan, slstm_step
from slipstream.ops.slstm_scan import reference as slstm_reference

FORGET_BIAS = (5.0, -7.0)  # from the first channel of a head to the last: long memories, and very short ones


class SLSTM(Mixer, name="slstm", family="rnn"):
    paper = (
        "Beck et al. 2024, arXiv:2405.04517, eq. 8-17 and the block of its appendix; forget gate and start: xlstm 2.0.6"
    )
    use_when = "states must be tracked exactly (parity, counters, brackets), with gates that can revise what is stored"
    train_order, decode_order = "T", "1"
    writes = "i tanh(z~)"
    erases = "nothing"
    decays = "a number a channel, from x and h"
    reads = "sigmoid(o~) * c / n"
    symbols = {"R": "U, recurrent_weight", "W": "input_weight", "m": "slot m"}
    oracle = "sLSTMLayer of the package xlstm 2.0.6, tests/oracles/xlstm_ttt.npz"

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        conv_size: int = 4  # width of the short convolution that the input and forget gates read; 0 for none
        norm_eps: float = 1e-5  # of the norm over each head

    config: Config
    tiny = Config(d_model=16, n_heads=2, conv_size=3)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads = heads(config.d_model, config.n_heads)
        self.head_dim = config.d_model // self.n_heads
        by_head = (4, self.n_heads, self.head_dim, self.head_dim)
        self.conv1d = ShortConv(config.d_model, config.conv_size, bias=True) if config.conv_size else None
        self.input_weight = nn.Parameter(torch.randn(by_head) * (2 / (5 * config.d_model)) ** 0.5)
        self.recurrent_weight = nn.Parameter(torch.zeros(by_head))
        self.bias = nn.Parameter(torch.zeros(by_head[:3]))
        self.norm = HeadNorm(self.n_heads, config.d_model, config.norm_eps)
        self.bias.data[1] = torch.linspace(*FORGET_BIAS, self.head_dim)

    def slots(self) -> dict[str, Slot]:
        cell = Slot((self.n_heads, self.head_dim))
        start = {"h": cell, "c": cell, "n": cell, "m": Slot(cell.dims, start=-torch.inf)}
        return start if self.conv1d is None else start | {"conv": self.conv1d.slot()}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        gates, conv = self._gates(x, state, lengths)
        h, last = slstm_scan(gates, self.recurrent_weight, self._cell(state), lengths)
        slots = dict(zip("hcnm", last)) | conv
        return self.norm(h), state.advance(x.shape[1] if lengths is None else lengths, **slots)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        gates, conv = self._gates(x, state, None)
        h, last = slstm_step(gates[:, 0], self.recurrent_weight, self._cell(state))
        return self.norm(h[:, None]), state.advance(1, **dict(zip("hcnm", last)), **conv)

    def _cell(self, state: State) -> SLSTMState:
        return state["h"], state["c"], state["n"], state["m"]

    def _gates(
        self, x: Tensor, state: State, lengths: Int[Tensor, "B"] | None
    ) -> tuple[Float[Tensor, "B T 4 H K"], dict[str, Tensor]]:
        """What the gates get from the input, and the convolution's new state."""
        if self.conv1d is None:
            return self._read(x, x), {}
        near, conv = self.conv1d(x, state["conv"], lengths)
        return self._read(near, x), {"conv": conv}

    def _read(self, near: Float[Tensor, "B T D"], x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T 4 H K"]:
        """W and b; i and f from near, z and o from x."""
        W = self.input_weight
        read = [
            torch.einsum("bthk,ghjk->btghj", u.unflatten(-1, (self.n_heads, -1)), w)
            for u, w in ((near, W[:2]), (x, W[2:]))
        ]
        return torch.cat(read, 2) + self.bias

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        gates = self._read(x if self.conv1d is None else self.conv1d.reference(x), x)
        return self.norm(slstm_reference(gates, self.recurrent_weight, self._cell(self.init_state(len(x))))[0])

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return 2 * slstm_flops(B if mode == "step" else B * T, self.n_heads, self.head_dim)
