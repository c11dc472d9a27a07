r"""DSS: diagonal state spaces, whose modes all channels share; each channel has its own step sizes and weights.

    A_n = -exp(log_A_real_n) + i A_imag_n      (dt A)_{dn} = dt_d Re(A_n) + i dt~_d Im(A_n)
    h_t = exp(dt A) * h_{t-1} + u_t            y_t = Re(C (exp(dt A) - 1) / A . h_t) + D u_t
    out_t = W gelu(y_t) + b

This is the paper's DSS-EXP. Its other form, DSS-SOFTMAX, divides every mode of the kernel by its sum over the length of
the sequence; a layer whose output at a token depends on how many tokens follow is no causal layer, cannot be cut and
cannot generate. With decaying modes and no end in sight the softmax is DSS-EXP, with -C for C, so nothing is lost.
The frequencies start as those of HiPPO-LegS, and only the positive ones: C is complex and free, so there are no
conjugates, and no factor 2. Step sizes of the real and the imaginary part are learned apart, as in the authors' code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.hippo import hippo_modes
from slipstream.layers.linear import Linear
from slipstream.ops.lti_scan import lti_scan, lti_scan_flops, lti_step
from slipstream.ops.lti_scan import reference as lti_reference


class DSS(Mixer, name="dss", family="ssm"):
    paper = "Gupta, Gu & Berant 2022, arXiv:2203.14343, DSS-EXP of section 3; step sizes and block: the authors' code"
    use_when = "smooth signals, where S4D would be used, with fewer parameters: one set of modes serves all channels"
    writes, erases = "u, in complex modes", "nothing"
    decays, reads = (
        "fixed complex numbers, the same for all channels up to their step sizes",
        "Re(C (exp(dt A) - 1) / A . h)",
    )
    symbols = {"Λ": "A", "Δ": "exp(log_dt)", "w": "C", "H": "d_model", "N": "d_state"}
    oracle = "golden arrays of the paper's kernel by FFT, tests/oracles/make_state_space.py, state_space.npz"
    no_weight_decay = ("log_dt", "log_A_real", "A_imag", "C", "D")

    class Config(MixerConfig):
        d_state: int = 64  # complex modes of a channel
        dt_min: float = 0.001  # least step size at the start
        dt_max: float = 0.1  # largest step size at the start
        chunk_size: int = 64  # tokens of one Toeplitz product; no result depends on it

    config: Config
    tiny = Config(d_model=16, d_state=6, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D, N = config.d_model, config.d_state
        log_dt = torch.empty(D, 1).uniform_(math.log(config.dt_min), math.log(config.dt_max))
        self.log_dt = nn.Parameter(log_dt.repeat(1, 2))  # for the real and the imaginary part of A
        A = hippo_modes(2 * N).Lam.to(torch.complex64)
        self.log_A_real, self.A_imag = nn.Parameter((-A.real).log()), nn.Parameter(A.imag)
        self.C = nn.Parameter(torch.randn(D, N, 2))
        self.D = nn.Parameter(torch.randn(D))
        self.out_proj = Linear(D, D)

    def slots(self) -> dict[str, Slot]:
        return {"h": Slot((self.config.d_model, self.config.d_state), dtype=torch.complex64)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        y, h = lti_scan(x, *self._modes(), state["h"], lengths, self.config.chunk_size)
        return self._out(x, y), state.advance(x.shape[1] if lengths is None else lengths, h=h)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        y, h = lti_step(x[:, 0], *self._modes(), state["h"])
        return self._out(x, y[:, None]), state.advance(1, h=h)

    def _modes(self) -> tuple[Complex[Tensor, "D N"], Complex[Tensor, "D N"]]:
        """log_decay = dt A, and weight = C (exp(dt A) - 1) / A."""
        wide = torch.promote_types(self.C.dtype, torch.float32)
        A = torch.complex(-torch.exp(self.log_A_real.to(wide)), self.A_imag.to(wide))
        dt = torch.exp(self.log_dt.to(wide))
        log_decay = torch.complex(dt[:, :1] * A.real, dt[:, 1:] * A.imag)
        return log_decay, torch.view_as_complex(self.C.to(wide)) * torch.expm1(log_decay) / A

    def _out(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out_proj(F.gelu(torch.addcmul(y, self.D, x)))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        log_decay, weight = self._modes()
        y, _ = lti_reference(x, log_decay, weight, weight.new_zeros(x.shape[0], *weight.shape))
        return self._out(x, y)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        if mode == "step":
            return 0.0
        return lti_scan_flops(T, B, self.config.d_model, self.config.d_state, self.config.chunk_size)
