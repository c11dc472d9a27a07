r"""QRNN: convolutions make candidate and gates, and a recurrent pooling without weights keeps them.

    z_t = tanh(W_z * X)_t      f_t = sigmoid(W_f * X)_t      o_t = sigmoid(W_o * X)_t      over the last conv_size tokens
    c_t = f_t * c_{t-1} + (1 - f_t) * z_t                    h_t = o_t * c_t                (fo-pooling)

W * X is a masked convolution with all channels; its weight holds z, f, o one after the other, as nn.Conv1d's. Zoneout is
left out. The forget gate's bias starts above 0, as in the LSTM beside it; the paper does not say. Where d_hidden differs
from d_model an output projection leads back. The gates never see the state.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.ops.causal_conv import dilated_conv, dilated_conv_flops
from slipstream.ops.causal_conv import reference as conv_reference
from slipstream.ops.linear_scan import linear_scan


class QRNN(Mixer, name="qrnn", family="rnn"):
    paper = "Bradbury, Merity, Xiong & Socher 2016, arXiv:1611.01576, section 2, fo-pooling"
    use_when = "text by characters or words runs on small machines, and the last few tokens with a slow average of them suffice"
    writes, erases = "(1 - f) * z, with z from the last conv_size tokens", "nothing"
    decays, reads = "f: a number a channel, from the last conv_size tokens", "o * c"
    symbols = {"k": "conv_size", "c": "slot c"}
    oracle = "golden arrays of a loop in numpy, tests/oracles/test_linear_rnn_oracles.py"

    class Config(MixerConfig):
        d_hidden: int | None = None  # width of the state; default d_model
        conv_size: int = 2  # tokens the candidate and the gates see
        forget_bias: float = 1.0  # start of the forget gate's bias: above 0 it remembers from the first step on

    config: Config
    tiny = Config(d_model=16, d_hidden=24, conv_size=3)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.conv_size < 1:
            raise InputError(f"conv_size {config.conv_size}: candidate and gates see at least 1 token")
        self.d_hidden = config.d_hidden or config.d_model
        self.conv = nn.Conv1d(config.d_model, 3 * self.d_hidden, config.conv_size)
        nn.init.constant_(self._bias().chunk(3)[1], config.forget_bias)
        same = self.d_hidden == config.d_model
        self.out_proj = nn.Identity() if same else Linear(self.d_hidden, config.d_model, bias=False)

    def _bias(self) -> Tensor:
        return self.conv.get_parameter("bias")

    def slots(self) -> dict[str, Slot]:
        return {"c": Slot((self.d_hidden,)), "conv": Slot((self.config.conv_size - 1, self.config.d_model), dtype=None)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        a, line = dilated_conv(x, self.conv.weight, self._bias(), state["conv"], lengths)
        f, write, o = self._gates(a)
        c, last = linear_scan(f, write, state["c"], lengths)
        return self._out(o, c), state.advance(x.shape[1] if lengths is None else lengths, c=last, conv=line)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        a, line = dilated_conv(x, self.conv.weight, self._bias(), state["conv"])
        f, write, o = self._gates(a)
        c = torch.addcmul(write, f, state["c"][:, None])
        return self._out(o, c), state.advance(1, c=c[:, 0], conv=line)

    def _gates(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f, (1 - f) * z and o, in float32 at least."""
        z, f, o = a.to(torch.promote_types(a.dtype, torch.float32)).chunk(3, -1)
        return torch.sigmoid(f), torch.sigmoid(-f) * torch.tanh(z), torch.sigmoid(o)

    def _out(self, o: Tensor, c: Tensor) -> Tensor:
        return self.out_proj((o * c).to(self.conv.weight.dtype))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        z, f, o = conv_reference(x, self.conv.weight, self._bias()).chunk(3, -1)
        c, hs = x.new_zeros(x.shape[0], self.d_hidden), []
        for t in range(x.shape[1]):
            f_t = torch.sigmoid(f[:, t])
            c = f_t * c + (1 - f_t) * torch.tanh(z[:, t])
            hs.append(torch.sigmoid(o[:, t]) * c)
        return self.out_proj(torch.stack(hs, 1))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        tokens = B if mode == "step" else B * T
        return dilated_conv_flops(tokens, self.config.d_model, 3 * self.d_hidden, self.config.conv_size)
