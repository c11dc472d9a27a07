r"""HGRN: a gated linear recurrence of turning complex numbers whose forget gate cannot fall below a learned bound.

    mu_t = sigmoid(W_mu x_t + b)        lambda_t = gamma + (1 - gamma) * mu_t        c_t = silu(W_c x_t + b')  (complex)
    h_t = lambda_t exp(i theta) * h_{t-1} + (1 - lambda_t) * c_t
    y_t = W_o (layer_norm([Re h_t, Im h_t]) * silu(W_g x_t + b''))

theta, a fixed angle a channel, is learned, and the norm comes before the gate, as in the authors' code (the paper prints the other
order). There the bounds gamma of all layers are tied, so that they rise from layer to layer; a mixer knows no other layer,
so here gamma is its own learned vector, started evenly between 0 and lower_bound: short and long memories side by side.
fla's HGRN is the real form of this (theta = 0, half the state), and has the optional convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.short_conv import ShortConv
from slipstream.ops.linear_scan import linear_scan
from slipstream.ops.silu_gate import silu_gate


class HGRN(Mixer, name="hgrn", family="rnn"):
    paper = "Qin, Yang & Zhong 2023, arXiv:2311.04823, section 3; initialisation and order of norm: the authors' hgru-pytorch"
    use_when = "text or long sequences must do with a very small state, some channels of which remember from the start"
    writes, erases = "(1 - lambda) * c", "nothing"
    decays, reads = "lambda >= gamma: a number a channel, from x", "layer_norm([Re h, Im h]), gated"
    symbols = {"γ": "sigmoid(bound)", "θ": "theta", "λ": "|decay|"}
    oracle = "golden arrays of a loop in numpy; its op: fla 0.6.0 naive_recurrent_hgrn, tests/oracles/test_linear_rnn_oracles.py"
    no_weight_decay = ("bound", "theta")

    class Config(MixerConfig):
        lower_bound: float = 0.95  # largest start of the forget gate's learned lower bound
        conv_size: int = 0  # width of a short convolution on candidate and forget gate; 0 for none, as in the paper
        norm_eps: float = 1e-5  # of the output norm

    config: Config
    tiny = Config(d_model=16, conv_size=3)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not 0 < config.lower_bound < 1:
            raise InputError(f"lower_bound {config.lower_bound}: it is a share that is always kept, between 0 and 1")
        D = config.d_model
        self.input_proj, self.lambda_proj = Linear(D, 2 * D), Linear(D, D)
        self.conv1d = ShortConv(3 * D, config.conv_size, activation=False) if config.conv_size else None
        self.bound = nn.Parameter(torch.logit((torch.arange(D) + 0.5) / D * config.lower_bound))
        self.theta = nn.Parameter(10000 ** (-2 / D * torch.arange(D)))
        self.gate = Linear(D, 2 * D)
        self.norm = nn.LayerNorm(2 * D, config.norm_eps)
        self.out_proj = Linear(2 * D, D)

    def slots(self) -> dict[str, Slot]:
        h = Slot((self.config.d_model,), dtype=torch.complex64)
        return {"h": h} | ({"conv": self.conv1d.slot()} if self.conv1d else {})

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        line, conv = self._line(x, state, lengths)
        h, last = linear_scan(*self._decay_and_input(line), state["h"], lengths)
        return self._out(x, h), state.advance(x.shape[1] if lengths is None else lengths, h=last, **conv)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        line, conv = self._line(x, state, None)
        decay, write = self._decay_and_input(line)
        h = torch.addcmul(write, decay, state["h"][:, None])
        return self._out(x, h), state.advance(1, h=h[:, 0], **conv)

    def _line(self, x: Tensor, state: State, lengths: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Candidate (real and imaginary part of a channel side by side) and forget gate before their activations."""
        line = torch.cat([self.input_proj(x), self.lambda_proj(x)], -1)
        if self.conv1d is None:
            return line, {}
        line, conv = self.conv1d(line, state["conv"], lengths)
        return line, {"conv": conv}

    def _decay_and_input(
        self, line: Float[Tensor, "B T L"]
    ) -> tuple[Complex[Tensor, "B T D"], Complex[Tensor, "B T D"]]:
        """In float32 at least; 1 - lambda as a product, without cancellation."""
        c, f = line.to(torch.promote_types(line.dtype, torch.float32)).split([2 * len(self.bound), len(self.bound)], -1)
        bound, theta = self.bound.to(f.dtype), self.theta.to(f.dtype)
        rest = torch.sigmoid(-bound) * torch.sigmoid(-f)
        c = rest[..., None] * F.silu(c).unflatten(-1, (-1, 2))
        return torch.polar(1 - rest, theta.expand_as(rest)), torch.complex(c[..., 0], c[..., 1])

    def _out(self, x: Tensor, h: Complex[Tensor, "B T D"]) -> Tensor:
        feature = self.norm(torch.cat([h.real, h.imag], -1).to(x.dtype))
        return self.out_proj(silu_gate(feature, self.gate(x)))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        line = torch.cat([self.input_proj(x), self.lambda_proj(x)], -1)
        line = self.conv1d.reference(line) if self.conv1d else line
        c, f = line[..., : -len(self.bound)], line[..., -len(self.bound) :]
        c, gamma = F.silu(c[..., ::2]) + 1j * F.silu(c[..., 1::2]), torch.sigmoid(self.bound)
        turn = torch.exp(1j * self.theta)
        h, hs = torch.zeros_like(c[:, 0]), []
        for t in range(x.shape[1]):
            lam = gamma + (1 - gamma) * torch.sigmoid(f[:, t])
            h = lam * turn * h + (1 - lam) * c[:, t]
            hs.append(h)
        return self._out(x, torch.stack(hs, 1))
