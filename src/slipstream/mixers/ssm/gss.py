r"""GSS: a gated state space, narrow and without a step size, between a wide gate.

    u_t = gelu(W_u x_t)            v_t = gelu(W_v x_t)                                   (u narrow, v wide)
    A_n = -exp(log_A_real_n) + i exp(log_A_imag_n)
    h_t = exp(A) * h_{t-1} + u_t   y_t = Re(C (exp(A) - 1) / A . h_t) + D u_t
    out_t = W_o (W_y y_t * v_t) + b

The state space is DSS with its step size fixed to 1, drawn at random: the paper found that with a gate neither step sizes
nor HiPPO are needed. All channels share the modes A. Nothing of the memory depends on content; what is read from it does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.ops.lti_scan import lti_scan, lti_scan_flops, lti_step, zero_order_hold
from slipstream.ops.lti_scan import reference as lti_reference


class GSS(Mixer, name="gss", family="ssm"):
    paper = "Mehta, Gupta, Cutkosky & Neyshabur 2022, arXiv:2206.13947, section 3 and its pseudocode"
    use_when = "long documents with a filter in place of attention, at the speed of a feed-forward"
    writes, erases = "u, in complex modes", "nothing"
    decays, reads = "fixed complex numbers, the same for all channels", "W_y Re(C (exp(A) - 1) / A . h) * v"
    symbols = {"Λ": "A", "C": "C", "F": "expand * d_model", "H": "d_inner", "N": "d_state", "E": "d_model"}
    oracle = "golden arrays of the paper's kernel by FFT, tests/oracles/make_state_space.py, state_space.npz"
    no_weight_decay = ("log_A_real", "log_A_imag", "C", "D")

    class Config(MixerConfig):
        expand: int = 4  # width of the gate / d_model
        d_inner: int | None = None  # width of the state space; default d_model / 4
        d_state: int = 128  # complex modes of a channel (the paper takes 512)
        chunk_size: int = 64  # tokens of one Toeplitz product; no result depends on it

    config: Config
    tiny = Config(d_model=16, expand=2, d_inner=6, d_state=5, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D, N, wide = config.d_model, config.d_state, config.expand * config.d_model
        self.d_inner = config.d_inner or max(1, D // 4)
        self.u_proj, self.v_proj = Linear(D, self.d_inner, bias=False), Linear(D, wide, bias=False)
        self.log_A_real, self.log_A_imag = nn.Parameter(torch.randn(N)), nn.Parameter(torch.randn(N))
        self.C = nn.Parameter(torch.randn(self.d_inner, N, 2))
        self.D = nn.Parameter(torch.randn(self.d_inner))
        self.y_proj, self.out_proj = Linear(self.d_inner, wide, bias=False), Linear(wide, D)

    def slots(self) -> dict[str, Slot]:
        return {"h": Slot((self.d_inner, self.config.d_state), dtype=torch.complex64)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        u = F.gelu(self.u_proj(x))
        y, h = lti_scan(u, *self._modes(), state["h"], lengths, self.config.chunk_size)
        return self._out(x, u, y), state.advance(x.shape[1] if lengths is None else lengths, h=h)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        u = F.gelu(self.u_proj(x))
        y, h = lti_step(u[:, 0], *self._modes(), state["h"])
        return self._out(x, u, y[:, None]), state.advance(1, h=h)

    def _modes(self) -> tuple[Complex[Tensor, "H N"], Complex[Tensor, "H N"]]:
        """log_decay = A, and weight = C (exp(A) - 1) / A."""
        wide = torch.promote_types(self.C.dtype, torch.float32)
        A = torch.complex(-torch.exp(self.log_A_real.to(wide)), torch.exp(self.log_A_imag.to(wide)))
        C = torch.view_as_complex(self.C.to(wide))
        return zero_order_hold(A.expand_as(C), C, C.real.new_ones(len(C), 1))

    def _out(self, x: Tensor, u: Tensor, y: Tensor) -> Tensor:
        return self.out_proj(self.y_proj(torch.addcmul(y, self.D, u)) * F.gelu(self.v_proj(x)))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        u, (log_decay, weight) = F.gelu(self.u_proj(x)), self._modes()
        y, _ = lti_reference(u, log_decay, weight, weight.new_zeros(x.shape[0], *weight.shape))
        return self._out(x, u, y)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        if mode == "step":
            return 0.0
        return lti_scan_flops(T, B, self.d_inner, self.config.d_state, self.config.chunk_size)
