r"""LRU: a linear recurrence on a diagonal of complex numbers that start on a ring, then GELU and a gated linear unit.

    lambda_n = exp(-exp(nu_n) + i exp(theta_n))          |lambda_n| < 1 whatever nu is
    h_t = lambda * h_{t-1} + gamma * (B x_t)             y_t = Re(C h_t) + D * x_t
    out_t = (W_1 a_t + b_1) * sigmoid(W_2 a_t + b_2)     a_t = gelu(y_t)

gamma starts as sqrt(1 - |lambda|^2), which gives h the variance of B x. nu, theta and gamma are learned as logarithms. The mixer
is the paper's block without its norm and skip, which are the stack's. Weights are named as in minimal-LRU, whose GELU
is the tanh form. Nothing depends on content: it filters.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.ops.linear_scan import linear_scan


class LRU(Mixer, name="lru", family="rnn"):
    paper = (
        "Orvieto et al. 2023, arXiv:2303.06349, sections 3.2 to 3.4; block and initialisation: Zucchet's minimal-LRU"
    )
    use_when = (
        "long smooth signals call for filters of many time scales, not for content, with one state for all channels"
    )
    writes, erases = "gamma * B x", "nothing"
    decays, reads = "|lambda|: one fixed number a channel of h, which also turns", "Re(C h) + D * x"
    symbols = {"lambda": "decay, of nu_log and theta_log", "N": "d_state", "u": "x"}
    oracle = "lru-pytorch 0.1.3, with GELU and gated linear unit put after it, tests/oracles/test_linear_rnn_oracles.py"
    no_weight_decay = ("nu_log", "theta_log", "gamma_log", "D")

    class Config(MixerConfig):
        d_state: int | None = None  # complex numbers of state; default d_model
        r_min: float = 0.0  # least |lambda| at the start; near 1 remembers longer
        r_max: float = 0.999  # largest |lambda| at the start
        max_phase: float = 2 * math.pi  # largest angle of lambda at the start; small for slow signals

    config: Config
    tiny = Config(d_model=16, d_state=12, r_min=0.4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not 0 <= config.r_min < config.r_max < 1:
            raise InputError(f"lru needs 0 <= r_min < r_max < 1; got {config.r_min} and {config.r_max}")
        D, N = config.d_model, config.d_state or config.d_model
        ring = torch.empty(N).uniform_(max(config.r_min, 1e-4) ** 2, config.r_max**2)  # |lambda|^2: even over the area
        self.nu_log = nn.Parameter(torch.log(-0.5 * ring.log()))
        self.theta_log = nn.Parameter(torch.log(torch.empty(N).uniform_(1e-4, 1) * config.max_phase))
        self.gamma_log = nn.Parameter(0.5 * torch.log1p(-ring))
        self.B_re, self.B_im = (nn.Parameter(torch.randn(N, D) / (2 * D) ** 0.5) for _ in range(2))
        self.C_re, self.C_im = (nn.Parameter(torch.randn(D, N) / N**0.5) for _ in range(2))
        self.D = nn.Parameter(torch.randn(D))
        self.out1, self.out2 = Linear(D, D), Linear(D, D)

    def slots(self) -> dict[str, Slot]:
        return {"h": Slot((len(self.nu_log),), dtype=torch.complex64)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        write = self._write(x)
        h, last = linear_scan(self._decay().expand_as(write), write, state["h"], lengths)
        return self._out(x, h), state.advance(x.shape[1] if lengths is None else lengths, h=last)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        h = torch.addcmul(self._write(x), self._decay(), state["h"][:, None])
        return self._out(x, h), state.advance(1, h=h[:, 0])

    def _decay(self) -> Complex[Tensor, "N"]:
        nu, theta = (p.to(torch.promote_types(p.dtype, torch.float32)) for p in (self.nu_log, self.theta_log))
        return torch.polar(torch.exp(-torch.exp(nu)), torch.exp(theta))

    def _write(self, x: Float[Tensor, "B T D"]) -> Complex[Tensor, "B T N"]:
        """gamma * B x, the real and imaginary rows of B in one product."""
        u = F.linear(x, torch.cat([self.B_re, self.B_im]))
        real, imag = u.to(torch.promote_types(u.dtype, torch.float32)).chunk(2, -1)
        gamma = torch.exp(self.gamma_log.to(real.dtype))
        return torch.complex(gamma * real, gamma * imag)

    def _out(self, x: Tensor, h: Complex[Tensor, "B T N"]) -> Tensor:
        y = F.linear(torch.cat([h.real, h.imag], -1).to(x.dtype), torch.cat([self.C_re, -self.C_im], 1))
        return self._block(torch.addcmul(y, self.D, x))

    def _block(self, y: Tensor) -> Tensor:
        a = F.gelu(y, approximate="tanh")
        return self.out1(a) * torch.sigmoid(self.out2(a))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        lam = torch.exp(torch.complex(-torch.exp(self.nu_log), torch.exp(self.theta_log)))
        B, C = torch.complex(self.B_re, self.B_im), torch.complex(self.C_re, self.C_im)
        h, ys = lam.new_zeros(x.shape[0], len(lam)), []
        for t in range(x.shape[1]):
            h = lam * h + torch.exp(self.gamma_log) * (x[:, t].to(B.dtype) @ B.T)
            ys.append((h @ C.T).real + self.D * x[:, t])
        return self._block(torch.stack(ys, 1))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return 2.0 * (B if mode == "step" else B * T) * 4 * self.B_re.numel()
