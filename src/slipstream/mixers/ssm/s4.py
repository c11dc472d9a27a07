r"""S4: a linear time-invariant state space whose matrix is HiPPO-LegS, diagonal plus low rank, in every channel.

    A = diag(Lam) - P P^*                          Lam_n = -exp(log_A_real_n) + i A_imag_n
    dA = (1 - dt A / 2)^-1 (1 + dt A / 2)          dB = (1 - dt A / 2)^-1 dt B                    (bilinear)
    h_t = dA h_{t-1} + dB u_t                      y_t = 2 Re(C . h_t) + D u_t
    out_t = GLU(W gelu(y_t) + b)

Lam, P and B are shared by all channels, as in the authors' later code; dt, C and D are each channel's own. Of conjugate
pairs one half is kept, n = d_state / 2 modes, and * runs over both halves. LegS has no well-conditioned eigenvectors, so dA
is not made diagonal: in this basis it is a contraction for any weights. One token is a Woodbury solve, linear in n; many
tokens go by chunks with dA as a real d_state x d_state matrix a channel. That is the paper's convolution, exactly, without
its Cauchy kernel and transform, in work linear in T; and a state may enter anywhere. The paper's first form had two
factors, P Q^*; Q = P keeps it stable (Goel et al. 2022, arXiv:2202.09729).
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
from slipstream.ops.dense_lti_scan import dense_lti_flops, dense_lti_scan


class S4(Mixer, name="s4", family="ssm"):
    paper = "Gu, Goel & Re 2021, arXiv:2111.00396, sections 2 and 3; Q = P: Goel et al. 2022, arXiv:2202.09729"
    use_when = "long smooth signals whose whole past matters evenly (audio, sensors); S4D is faster and almost as good"
    writes, erases = "dB u", "nothing"
    decays, reads = "a fixed matrix a channel", "2 Re(C . h)"
    symbols = {"Λ": "Lam", "Δ": "exp(log_dt)", "N": "d_state", "H": "d_model", "A-bar": "dA", "B-bar": "dB", "x": "h"}
    oracle = "golden arrays of the paper's kernel by dense matrices and FFT, make_state_space.py, state_space.npz"
    no_weight_decay = ("log_dt", "log_A_real", "A_imag", "P", "B", "C", "D")

    class Config(MixerConfig):
        d_state: int = 64  # real numbers of state per channel: d_state / 2 complex modes
        dt_min: float = 0.001  # least step size at the start
        dt_max: float = 0.1  # largest step size at the start
        chunk_size: int = 64  # tokens of one Toeplitz product, a power of two; no result depends on it

    config: Config
    tiny = Config(d_model=16, d_state=6, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D, modes = config.d_model, hippo_modes(config.d_state)
        self.log_dt = nn.Parameter(torch.empty(D).uniform_(math.log(config.dt_min), math.log(config.dt_max)))
        self.log_A_real = nn.Parameter((-modes.Lam.real).log().float())
        self.A_imag = nn.Parameter(modes.Lam.imag.float())
        self.P, self.B = (nn.Parameter(torch.view_as_real(v).float()) for v in (modes.P, modes.B))
        self.C = nn.Parameter(torch.randn(D, len(modes.P), 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.randn(D))
        self.out_proj = Linear(D, 2 * D)

    def slots(self) -> dict[str, Slot]:
        return {"h": Slot((self.config.d_model, self.config.d_state))}  # real parts, then imaginary

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        y, h = dense_lti_scan(x, *self._system(), state["h"], lengths, self.config.chunk_size)
        return self._out(x, y), state.advance(x.shape[1] if lengths is None else lengths, h=h)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        h = self._advance(torch.complex(*state["h"].chunk(2, -1)), x[:, 0, :, None])
        h = torch.cat([h.real, h.imag], -1)
        y = (h * self._real_C()).sum(-1)
        return self._out(x, y[:, None].to(x.dtype)), state.advance(1, h=h)

    def _advance(self, h: Complex[Tensor, "*B D n"], u: Float[Tensor, "*B D 1"]) -> Complex[Tensor, "*B D n"]:
        """One token: (1 - dt A / 2) h' = (1 + dt A / 2) h + dt B u, solved by Woodbury's identity."""
        half = 0.5 * torch.exp(self.log_dt.to(h.real.dtype))[:, None]
        Lam = torch.complex(-torch.exp(self.log_A_real.to(half)), self.A_imag.to(half))
        P, B = (torch.view_as_complex(v.to(half)) for v in (self.P, self.B))
        solved = 1 / (1 - half * Lam)  # the diagonal part's own inverse
        h = solved * (h + half * (Lam * h - P * _over_pairs(P, h)) + 2 * half * B * u)
        return h - solved * P * (half * _over_pairs(P, h) / (1 + half * _over_pairs(P, solved * P)))

    def _system(self) -> tuple[Float[Tensor, "D N N"], Float[Tensor, "D N"], Float[Tensor, "D N"]]:
        """dA, dB and C as real matrices over real and imaginary parts: what one token makes of each unit vector."""
        D, N, wide = self.config.d_model, self.config.d_state, torch.promote_types(self.C.dtype, torch.float32)
        unit = torch.eye(N, dtype=wide, device=self.C.device)
        basis = torch.complex(*unit.chunk(2, -1))[:, None].expand(-1, D, -1)
        columns = self._advance(basis, unit.new_zeros(N, D, 1))
        written = self._advance(torch.zeros_like(basis[0]), unit.new_ones(D, 1))
        A = torch.cat([columns.real, columns.imag], -1).permute(1, 2, 0)
        return A, torch.cat([written.real, written.imag], -1), self._real_C()

    def _real_C(self) -> Float[Tensor, "D N"]:
        C = self.C.to(torch.promote_types(self.C.dtype, torch.float32))
        return 2 * torch.cat([C[..., 0], -C[..., 1]], -1)

    def _out(self, x: Tensor, y: Tensor) -> Tensor:
        return F.glu(self.out_proj(F.gelu(torch.addcmul(y, self.D, x))), -1)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        Lam, P, B, C = self._both_halves()
        one, half = torch.eye(self.config.d_state), 0.5 * torch.exp(self.log_dt)[:, None, None]
        A = torch.diag(Lam) - torch.outer(P, P.conj())
        dA = torch.linalg.solve(one - half * A, one + half * A)
        dB = torch.linalg.solve(one - half * A, (2 * half * B).mT)[..., 0]
        h, outs = torch.zeros_like(C).repeat(x.shape[0], 1, 1), []
        for t in range(x.shape[1]):
            h = torch.einsum("dij,bdj->bdi", dA, h) + dB * x[:, t, :, None]
            outs.append(torch.einsum("dn,bdn->bd", C, h).real)
        return self._out(x, torch.stack(outs, 1))

    def _both_halves(self) -> list[Complex[Tensor, "... N"]]:
        """Lam, P, B and C with their conjugates."""
        Lam = torch.complex(-torch.exp(self.log_A_real), self.A_imag)
        return [torch.cat([v, v.conj()], -1) for v in (Lam, *map(torch.view_as_complex, (self.P, self.B, self.C)))]

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        if mode == "step":
            return 0.0
        return dense_lti_flops(T, B, self.config.d_model, self.config.d_state, self.config.chunk_size)


def _over_pairs(P: Complex[Tensor, "n"], h: Complex[Tensor, "*B n"]) -> Float[Tensor, "*B 1"]:
    """P^* h over both halves of the pairs."""
    return 2 * (P.real * h.real + P.imag * h.imag).sum(-1, keepdim=True)
