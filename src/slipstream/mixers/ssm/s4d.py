r"""S4D: a linear time-invariant state space with a diagonal complex matrix, then GELU and a gated linear unit.

    A_n = -exp(log_A_real_n) + i A_imag_n      dA = exp(dt A)      dB = (dA - 1) / A          (zero-order hold, B = 1)
    h_t = dA * h_{t-1} + dB u_t                y_t = 2 Re(C . h_t) + D u_t
    out_t = GLU(W gelu(y_t) + b)

Each channel has its own d_state / 2 modes; the other half are their conjugates, which is the factor 2. Channels meet
only in W. S4D-Lin starts with the frequencies pi n, S4D-Inv with those of HiPPO-LegS in the limit. Nothing depends on
content: it filters.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.ops.lti_scan import lti_scan, lti_scan_flops, lti_step, zero_order_hold
from slipstream.ops.lti_scan import reference as lti_reference


class S4D(Mixer, name="s4d", family="ssm"):
    paper = "Gu, Gupta, Goel & Re 2022, arXiv:2206.11893, sections 3 and 4 (S4D-Inv, S4D-Lin); kernel: listing 1"
    use_when = "smooth signals (audio, sensors, forecasts) where filters of many time scales matter, not content"
    writes, erases = "dB u, in complex modes", "nothing"
    decays, reads = "fixed complex numbers a channel", "2 Re(C . h)"
    symbols = {"Δ": "exp(log_dt)", "H": "d_model", "N": "d_state", "u": "x"}
    oracle = "golden arrays of the paper's kernel by FFT, tests/oracles/test_ssm_rnn_oracles.py"
    no_weight_decay = ("log_dt", "log_A_real", "A_imag", "D")

    class Config(MixerConfig):
        d_state: int = 64  # real numbers of state per channel: d_state / 2 complex modes
        init: Literal["lin", "inv"] = "lin"  # starting frequencies: S4D-Lin or S4D-Inv
        dt_min: float = 0.001  # least step size at the start
        dt_max: float = 0.1  # largest step size at the start
        chunk_size: int = 64  # tokens of one Toeplitz product; no result depends on it

    config: Config
    tiny = Config(d_model=16, d_state=8, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.d_state < 2 or config.d_state % 2:
            raise InputError(f"d_state {config.d_state}: its modes come in pairs; take {max(2, config.d_state + 1)}")
        D, n_modes = config.d_model, config.d_state // 2
        self.log_dt = nn.Parameter(torch.empty(D).uniform_(math.log(config.dt_min), math.log(config.dt_max)))
        self.log_A_real = nn.Parameter(torch.full((D, n_modes), math.log(0.5)))
        self.A_imag = nn.Parameter(frequencies(n_modes, config.init).repeat(D, 1))
        self.C = nn.Parameter(torch.randn(D, n_modes, 2) * 0.5**0.5)  # real and imaginary parts of unit variance
        self.D = nn.Parameter(torch.randn(D))
        self.out_proj = Linear(D, 2 * D)

    def slots(self) -> dict[str, Slot]:
        return {"h": Slot((self.config.d_model, self.config.d_state // 2), dtype=torch.complex64)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        y, h = lti_scan(x, *self._modes(), state["h"], lengths, self.config.chunk_size)
        return self._out(x, y), state.advance(x.shape[1] if lengths is None else lengths, h=h)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        y, h = lti_step(x[:, 0], *self._modes(), state["h"])
        return self._out(x, y[:, None]), state.advance(1, h=h)

    def _modes(self) -> tuple[Complex[Tensor, "D N"], Complex[Tensor, "D N"]]:
        """log_decay = dt A, and weight = 2 C dB, so that x itself enters the state's recurrence."""
        wide = torch.promote_types(self.C.dtype, torch.float32)
        A = torch.complex(-torch.exp(self.log_A_real.to(wide)), self.A_imag.to(wide))
        return zero_order_hold(A, 2 * torch.view_as_complex(self.C.to(wide)), self.log_dt.to(wide).exp()[:, None])

    def _out(self, x: Tensor, y: Tensor) -> Tensor:
        return F.glu(self.out_proj(F.gelu(torch.addcmul(y, self.D, x))))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        log_decay, weight = self._modes()
        y, _ = lti_reference(x, log_decay, weight, weight.new_zeros(x.shape[0], *weight.shape))
        return self._out(x, y)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        if mode == "step":
            return 0.0
        return lti_scan_flops(T, B, self.config.d_model, self.config.d_state // 2, self.config.chunk_size)


def frequencies(n_modes: int, init: str) -> Float[Tensor, "N"]:
    """Imaginary parts of A: pi n (lin), or (N / pi) (N / (2n + 1) - 1) with N = 2 n_modes (inv)."""
    n, N = torch.arange(n_modes), 2 * n_modes
    return math.pi * n if init == "lin" else N / math.pi * (N / (2 * n + 1) - 1)
