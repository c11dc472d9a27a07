r"""The recurrent block of Griffin: a gated linear recurrence (RG-LRU) beside a GELU branch.

    u_t = conv(W_x x_t)       r_t, i_t = sigmoid(W_a u_t + b_a), sigmoid(W_i u_t + b_i)      (block-diagonal W_a, W_i)
    a_t = exp(-8 softplus(recurrent_param) r_t)
    h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * i_t * u_t          y_t = W_out (gelu(W_y x_t) * h_t)

The paper's Lambda is -recurrent_param: a = sigmoid(Lambda). At the first token of a document the root is replaced by 1,
as the authors' code and transformers' RecurrentGemma do; their weight names are kept, and their tanh form of GELU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.short_conv import ShortConv
from slipstream.ops.linear_scan import linear_scan
from slipstream.ops.linear_scan import reference as linear_reference

SHARPNESS = 8.0  # c of the paper, eq. 3


class RGLRU(Mixer, name="rg_lru", family="rnn"):
    paper = "De et al. 2024, arXiv:2402.19427, eq. 1-4, section 2.3; the first token: transformers RecurrentGemma"
    use_when = "long streams with a very small state, best in turn with layers of local attention (Griffin)"
    writes, erases = "sqrt(1 - a^2) * i * u", "nothing"
    decays, reads = "a number a channel, from x", "h, gated"
    symbols = {"Λ": "-recurrent_param", "c": "8", "D_RNN": "d_inner"}
    oracle = "transformers RecurrentGemmaRecurrentBlock, tests/oracles/test_ssm_rnn_oracles.py"
    no_weight_decay = ("recurrent_param",)

    class Config(MixerConfig):
        d_inner: int | None = None  # width of the recurrence; default d_model (the paper takes 4/3 of it)
        n_heads: int | None = None  # blocks of the gates' matrices; default about d_inner / 64
        conv_size: int = 4  # width of the short convolution

    config: Config
    tiny = Config(d_model=16, d_inner=24, n_heads=3, conv_size=3)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.d_inner = config.d_inner or config.d_model
        self.linear_y = Linear(config.d_model, self.d_inner)
        self.linear_x = Linear(config.d_model, self.d_inner)
        self.conv_1d = ShortConv(self.d_inner, config.conv_size, bias=True, activation=False)
        self.rg_lru = Gates(self.d_inner, heads(self.d_inner, config.n_heads))
        self.linear_out = Linear(self.d_inner, config.d_model)

    def slots(self) -> dict[str, Slot]:
        return {"h": Slot((self.d_inner,)), "conv": self.conv_1d.slot()}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        u, conv = self.conv_1d(self.linear_x(x), state["conv"], lengths)
        decay, write = self._decay_and_input(u, state.length)
        h, last = linear_scan(decay, write, state["h"], lengths)
        return self._out(x, h), state.advance(x.shape[1] if lengths is None else lengths, h=last, conv=conv)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        u, conv = self.conv_1d(self.linear_x(x), state["conv"])
        decay, write = self._decay_and_input(u, state.length)
        h = torch.addcmul(write[:, 0], decay[:, 0], state["h"])
        return self._out(x, h[:, None]), state.advance(1, h=h, conv=conv)

    def _decay_and_input(self, u: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and what is added to the state, in float32 at least."""
        log_a, i = self.rg_lru(u)
        positions = length[:, None] + torch.arange(u.shape[1], device=u.device)
        keep = torch.where((positions == 0)[..., None], 1.0, root_of_rest(log_a))
        return torch.exp(log_a), keep * i * u

    def _out(self, x: Tensor, h: Tensor) -> Tensor:
        return self.linear_out(F.gelu(self.linear_y(x), approximate="tanh") * h.to(x.dtype))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        u = self.conv_1d.reference(self.linear_x(x))
        log_a, i = self.rg_lru(u)
        a = torch.exp(log_a)
        root = torch.cat([torch.ones_like(a[:, :1]), torch.sqrt(1 - a[:, 1:] ** 2)], 1)
        return self._out(x, linear_reference(a, root * i * u, u.new_zeros(u.shape[0], self.d_inner))[0])

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return 2 * 2.0 * (B if mode == "step" else B * T) * self.rg_lru.input_gate_weight.numel()


class Gates(nn.Module):
    """The recurrence gate, as log a_t, and the input gate, each by a block-diagonal matrix."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        block = width // n_heads
        slowest = torch.empty(width).uniform_(0.9, 0.999)  # a^8, where the gate is wide open
        self.recurrent_param = nn.Parameter(torch.log(torch.expm1(-slowest.log() / SHARPNESS)))
        self.input_gate_weight = nn.Parameter(torch.randn(n_heads, block, block) * block**-0.5)
        self.input_gate_bias = nn.Parameter(torch.zeros(n_heads, block))
        self.recurrent_gate_weight = nn.Parameter(torch.randn(n_heads, block, block) * block**-0.5)
        self.recurrent_gate_bias = nn.Parameter(torch.zeros(n_heads, block))

    def forward(self, u: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]]:
        """log a_t <= 0 and i_t, in float32 at least."""
        wide = torch.promote_types(u.dtype, torch.float32)
        by_block = u.unflatten(-1, self.input_gate_bias.shape)
        r, i = (
            torch.sigmoid((torch.einsum("bthi,hij->bthj", by_block, w) + b).flatten(2).to(wide))
            for w, b in (
                (self.recurrent_gate_weight, self.recurrent_gate_bias),
                (self.input_gate_weight, self.input_gate_bias),
            )
        )
        return -SHARPNESS * F.softplus(self.recurrent_param.to(wide)) * r, i


def root_of_rest(log_a: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """sqrt(1 - a^2) without cancellation near a = 1; where a is 1 to the last bit its gradient is 0, not infinite."""
    return torch.sqrt(torch.clamp(-torch.expm1(2 * log_a), min=torch.finfo(log_a.dtype).tiny))
