r"""H3: keys are shifted in time, multiplied with values, remembered by a state space, and read by queries.

    q, k, v = W_q u, W_k u, W_v u              k~ = shift(k), a filter of conv_size taps
    A_n = -exp(log_A_real_n) + i A_imag_n      dA = (1 + dt A / 2) / (1 - dt A / 2)      dB = dt / (1 - dt A / 2)
    h_t = dA * h_{t-1} + dB k~_t v_t^T         S_t = 2 Re(C . h_t) + D k~_t v_t^T
    y_t = W_o (S_t^T q_t)

A head is head_dim wide, and its state space filters every entry of k~ v^T by the same modes; with head_dim 1, as in the
authors' models, all products are by channel. Their shift is a state space whose matrix moves a memory of conv_size inputs
by one: the short convolution that it is here. Its input vector stays e_1 and its skip is the convolution's last tap.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.short_conv import ShortConv
from slipstream.ops.lti_scan import lti_scan, lti_scan_flops, lti_step
from slipstream.ops.lti_scan import reference as lti_reference


class H3(Mixer, name="h3", family="ssm"):
    paper = "Fu et al. 2022, arXiv:2212.14052, section 3; bilinear steps, start and head_dim: the authors' code"
    use_when = "language with a fixed filter for memory: shift and product compare neighbours, the state space recalls"
    writes, erases = "dB k~ v^T, in complex modes", "nothing"
    decays, reads = "fixed complex numbers a head", "(2 Re(C . h))^T q"
    symbols = {"K-bar": "k~", "N": "d_state", "Δ": "exp(log_dt)", "d_h": "head_dim"}
    oracle = "golden arrays by FFT as in the authors' code, tests/oracles/make_state_space.py, state_space.npz"
    no_weight_decay = ("log_dt", "log_A_real", "A_imag", "C", "D")

    class Config(MixerConfig):
        head_dim: int = 1  # width of a head; its memory is head_dim x head_dim x d_state
        d_state: int = 64  # real numbers of state per entry: d_state / 2 complex modes
        conv_size: int = 64  # taps of the shift on k
        dt_min: float = 0.001  # least step size at the start
        dt_max: float = 0.1  # largest step size at the start
        chunk_size: int = 64  # tokens of one Toeplitz product; no result depends on it

    config: Config
    tiny = Config(d_model=16, head_dim=2, d_state=6, conv_size=5, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D, N, P = config.d_model, config.d_state, config.head_dim
        if D % P:
            raise InputError(f"d_model {D} does not divide into heads of head_dim {P}")
        if N < 2 or N % 2:
            raise InputError(f"d_state {N}: its modes come in pairs; take {max(2, N + 1)}")
        H = D // P
        self.q_proj, self.k_proj, self.v_proj = (Linear(D, D) for _ in range(3))
        self.k_conv1d = ShortConv(D, config.conv_size, activation=False)
        self.k_conv1d.weight.data[..., -1] += torch.randn(D, 1)
        self.log_dt = nn.Parameter(torch.empty(H).uniform_(math.log(config.dt_min), math.log(config.dt_max)))
        self.log_A_real = nn.Parameter(torch.full((H, N // 2), math.log(0.5)))
        self.A_imag = nn.Parameter((math.pi * torch.arange(N // 2)).repeat(H, 1))
        self.C = nn.Parameter(torch.randn(H, N // 2, 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.randn(H))
        self.o_proj = Linear(D, D)

    def slots(self) -> dict[str, Slot]:
        entries, modes = self.config.d_model * self.config.head_dim, self.config.d_state // 2
        return {"h": Slot((entries, modes), dtype=torch.complex64), "conv": self.k_conv1d.slot()}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        k, conv = self.k_conv1d(self.k_proj(x), state["conv"], lengths)
        kv = self._products(k, self.v_proj(x))
        S, h = lti_scan(kv, *self._modes(), state["h"], lengths, self.config.chunk_size)
        return self._out(x, S, kv), state.advance(x.shape[1] if lengths is None else lengths, h=h, conv=conv)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        k, conv = self.k_conv1d(self.k_proj(x), state["conv"])
        kv = self._products(k, self.v_proj(x))
        S, h = lti_step(kv[:, 0], *self._modes(), state["h"])
        return self._out(x, S[:, None], kv), state.advance(1, h=h, conv=conv)

    def _products(self, k: Tensor, v: Tensor) -> Float[Tensor, "B T E"]:
        """k v^T of every head, its entries (head, key, value) in one row."""
        k, v = (t.unflatten(-1, (-1, self.config.head_dim)) for t in (k, v))
        return (k[..., :, None] * v[..., None, :]).flatten(2)

    def _modes(self) -> tuple[Complex[Tensor, "E n"], Complex[Tensor, "E n"]]:
        """log_decay = log dA, and weight = 2 C dB, for every entry of a head alike."""
        wide = torch.promote_types(self.C.dtype, torch.float32)
        A = torch.complex(-torch.exp(self.log_A_real.to(wide)), self.A_imag.to(wide))
        dt = torch.exp(self.log_dt.to(wide))[:, None]
        log_decay = torch.log((1 + dt * A / 2) / (1 - dt * A / 2))
        weight = 2 * torch.view_as_complex(self.C.to(wide)) * dt / (1 - dt * A / 2)
        entries = self.config.head_dim**2
        return log_decay.repeat_interleave(entries, 0), weight.repeat_interleave(entries, 0)

    def _out(self, x: Tensor, S: Tensor, kv: Tensor) -> Tensor:
        P = self.config.head_dim
        S = torch.addcmul(S, self.D.repeat_interleave(P**2), kv).unflatten(-1, (-1, P, P))
        return self.o_proj((S * self.q_proj(x).unflatten(-1, (-1, P, 1))).sum(-2).flatten(2))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        kv = self._products(self.k_conv1d.reference(self.k_proj(x)), self.v_proj(x))
        log_decay, weight = self._modes()
        S, _ = lti_reference(kv, log_decay, weight, weight.new_zeros(x.shape[0], *weight.shape))
        return self._out(x, S, kv)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        if mode == "step":
            return 0.0
        entries, modes = self.config.d_model * self.config.head_dim, self.config.d_state // 2
        return lti_scan_flops(T, B, entries, modes, self.config.chunk_size)
