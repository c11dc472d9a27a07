r"""S5: one state space with many inputs and many outputs, diagonal and complex, shared by all channels.

    A_n = -exp(log_A_real_n) + i A_imag_n      dA = exp(dt A)      dB = (dA - 1) / A * B        (zero-order hold)
    h_t = dA * h_{t-1} + dB u_t                y_t = 2 Re(C h_t) + D u_t
    out_t = gelu(y_t) * sigmoid(W gelu(y_t) + b)

B (n x D) and C (D x n) are full matrices, so channels meet in the state itself, and each mode has its own step size dt.
Modes come in conjugate pairs, of which the n = d_state / 2 with positive frequencies are kept: hence the factor 2. A
starts as the normal part of HiPPO-LegS, in n_blocks equal blocks, and B and C as real matrices seen in its eigenbasis. The
real part of A is kept negative by an exponential, where the authors' code learns it freely or clips it.
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
from slipstream.layers.hippo import hippo_modes
from slipstream.layers.linear import Linear
from slipstream.ops.linear_scan import linear_scan


class S5(Mixer, name="s5", family="ssm"):
    paper = "Smith, Warrington & Linderman 2022, arXiv:2208.04933, sections 3 and 4; start and gate: the authors' code"
    use_when = "smooth or irregular signals with a very small state: one set of modes for all channels together"
    writes, erases = "dB u", "nothing"
    decays, reads = "fixed complex numbers", "2 Re(C h)"
    symbols = {
        "Λ": "A",
        "Δ": "exp(log_dt)",
        "B~": "B",
        "C~": "C",
        "P": "d_state",
        "H": "d_model",
        "J": "n_blocks",
        "x": "h",
    }
    oracle = "s5-pytorch 0.2.1 (S5SSM), tests/oracles/make_s5.py, state_space.npz"
    no_weight_decay = ("log_dt", "log_A_real", "A_imag", "B", "D")

    class Config(MixerConfig):
        d_state: int = 256  # real numbers of state: d_state / 2 complex modes
        n_blocks: int = 8  # HiPPO matrices side by side at the start
        dt_min: float = 0.001  # least step size at the start
        dt_max: float = 0.1  # largest step size at the start

    config: Config
    tiny = Config(d_model=16, d_state=12, n_blocks=2)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D, N, blocks = config.d_model, config.d_state, config.n_blocks
        if blocks < 1 or N % (2 * blocks):
            raise InputError(
                f"d_state {N} does not divide into n_blocks {blocks} of conjugate pairs; take {2 * blocks * 8}"
            )
        modes = hippo_modes(N // blocks)
        A, V = modes.Lam.repeat(blocks), torch.block_diag(*[modes.V] * blocks)
        self.log_dt = nn.Parameter(torch.empty(N // 2).uniform_(math.log(config.dt_min), math.log(config.dt_max)))
        self.log_A_real, self.A_imag = nn.Parameter((-A.real).log().float()), nn.Parameter(A.imag.float())
        B, C = torch.randn(N, D) / D**0.5, torch.randn(D, N, 2) / N**0.5
        self.B = nn.Parameter(torch.view_as_real(V.mH @ B.to(V)).float())
        self.C = nn.Parameter(torch.view_as_real(torch.view_as_complex(C).to(V) @ V).float())
        self.D = nn.Parameter(torch.randn(D))
        self.gate_proj = Linear(D, D)

    def slots(self) -> dict[str, Slot]:
        return {"h": Slot((self.config.d_state // 2,), dtype=torch.complex64)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        dA, u = self._written(x)
        h, last = linear_scan(dA.expand_as(u), u, state["h"], lengths)
        return self._out(x, h), state.advance(x.shape[1] if lengths is None else lengths, h=last)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        dA, u = self._written(x)
        h = dA * state["h"] + u[:, 0]
        return self._out(x, h[:, None]), state.advance(1, h=h)

    def _discretised(self) -> tuple[Complex[Tensor, "n"], Complex[Tensor, "n D"]]:
        """dA and dB, complex64 at least."""
        wide = torch.promote_types(self.B.dtype, torch.float32)
        A = torch.complex(-torch.exp(self.log_A_real.to(wide)), self.A_imag.to(wide))
        dt_A = torch.exp(self.log_dt.to(wide)) * A
        return torch.exp(dt_A), (torch.expm1(dt_A) / A)[:, None] * torch.view_as_complex(self.B.to(wide))

    def _written(self, x: Tensor) -> tuple[Complex[Tensor, "n"], Complex[Tensor, "B T n"]]:
        """dA, and dB u by a product of real matrices."""
        dA, dB = self._discretised()
        parts = F.linear(x.to(dB.real.dtype), torch.cat([dB.real, dB.imag]))
        return dA, torch.complex(*parts.chunk(2, -1))

    def _out(self, x: Tensor, h: Complex[Tensor, "B T n"]) -> Tensor:
        C = self.C.to(h.real.dtype)
        y = F.linear(torch.cat([h.real, h.imag], -1), 2 * torch.cat([C[..., 0], -C[..., 1]], -1)).to(x.dtype)
        y = F.gelu(torch.addcmul(y, self.D, x))
        return y * torch.sigmoid(self.gate_proj(y))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        dA, dB = self._discretised()
        C, h, outs = torch.view_as_complex(self.C), dA.new_zeros(x.shape[0], len(dA)), []
        for t in range(x.shape[1]):
            h = dA * h + torch.einsum("nd,bd->bn", dB, x[:, t].to(dB))
            outs.append(2 * torch.einsum("dn,bn->bd", C, h).real + self.D * x[:, t])
        y = F.gelu(torch.stack(outs, 1))
        return y * torch.sigmoid(self.gate_proj(y))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        tokens = B if mode == "step" else B * T
        return 4.0 * tokens * self.config.d_model * self.config.d_state
