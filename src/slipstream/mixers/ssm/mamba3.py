r"""Mamba-3: a selective state space that rotates (a complex state) and writes by the trapezoidal rule.

    z, x, B, C, dt, a, lam, theta = W_in u      dt = softplus(dt + dt_bias)      lam = sigmoid(lam)      a = -softplus(a)
    phi_t = phi_{t-1} + pi tanh(theta_t) dt_t   B_t = R(phi_t) (rms_norm(B) * w_B + b_B)   C_t = R(phi_t) (rms_norm(C) * w_C + b_C)
    S_t = exp(dt_t a_t) (S_{t-1} + (1 - lam_t) dt_t B_{t-1} x_{t-1}^T) + lam_t dt_t B_t x_t^T
    o_t = S_t^T C_t + D x_t                     y_t = W_out (o_t * silu(z_t))

State space files keep the paper's letters: C is the query, B the key, x the value. R turns the first pairs of channels, each
by an angle of its own, which decays in turning time: real matrices, complex eigenvalues. There is no short convolution;
the trapezoidal rule has the token before. This is the form with one input and one output a head (SISO), without a norm
before W_out; of the decay the authors' newest code has another choice, and this is that of fla and of the release.
Weights are named and laid out as in the authors' code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.decay_gate import time_steps
from slipstream.layers.linear import Linear
from slipstream.layers.norm import RMSNorm
from slipstream.ops.outer_scan import outer_flops, outer_scan, outer_step
from slipstream.ops.silu_gate import silu_gate
from slipstream.ops.valid import last_tokens, zero_padding

LEAST_RATE = 1e-4  # of decay: a is at most minus this


class Mamba3(Mixer, name="mamba3", family="ssm"):
    paper = "Lahoti et al. 2026, arXiv:2603.15569; step, norms and biases as in the authors' code (state-spaces/mamba)"
    use_when = "long streams with constant memory, where states must also be tracked (counting, parity)"
    writes, erases = "lam dt B x^T + (1 - lam) dt B' x'^T of the token before", "nothing"
    decays, reads = "a number a head, from x", "S^T C"
    symbols = {
        "α": "exp(dt a)",
        "β": "(1 - lam) dt exp(dt a)",
        "γ": "lam dt",
        "λ": "lam",
        "Δ": "dt",
        "P": "head_dim",
        "N": "d_state",
    }
    oracle = "numpy loop by the authors' reference step, tests/oracles/make_state_space.py, state_space.npz"
    no_weight_decay = ("dt_bias", "B_bias", "C_bias", "D")

    class Config(MixerConfig):
        expand: int = 2  # inner width / d_model
        n_heads: int | None = None  # heads, one decay each; default inner width / 64
        n_groups: int = 1  # groups of heads that share B and C before their biases
        d_state: int = 128  # width of B and C
        rope_fraction: float = 0.5  # share of B's and C's channels that are turned
        chunk_size: int = 64  # tokens of one matrix product; no result depends on it

    config: Config
    tiny = Config(d_model=16, n_heads=4, n_groups=2, d_state=6, rope_fraction=0.7, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        N, G = config.d_state, config.n_groups
        self.d_inner = config.expand * config.d_model
        self.n_heads, self.n_angles = heads(self.d_inner, config.n_heads), int(N * config.rope_fraction) // 2
        if G < 1 or self.n_heads % G:
            raise InputError(f"n_heads {self.n_heads} does not divide into n_groups {G}")
        if not 0 < self.n_angles <= N // 2:
            raise InputError(
                f"rope_fraction {config.rope_fraction} of d_state {N} is {self.n_angles} pairs; take 0.5 or 1"
            )
        self.widths = [self.d_inner, self.d_inner, G * N, G * N, *[self.n_heads] * 3, self.n_angles]
        self.in_proj = Linear(config.d_model, sum(self.widths), bias=False)
        self.dt_bias = time_steps(self.n_heads)
        self.B_bias, self.C_bias = (nn.Parameter(torch.ones(self.n_heads, 1, N)) for _ in range(2))
        self.B_norm, self.C_norm = RMSNorm(N, eps=1e-5), RMSNorm(N, eps=1e-5)
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.out_proj = Linear(self.d_inner, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        H, N, P = self.n_heads, self.config.d_state, self.d_inner // self.n_heads
        return {"S": Slot((H, N, P)), "angle": Slot((H, self.n_angles)), "B": Slot((1, H, N)), "x": Slot((1, H, P))}

    def prefill(self, u: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        z, x, B, C, angle, log_decay, late, own = self._selected(u, state["angle"], lengths)
        S = self._with_last(state, late)
        late = F.pad(late[:, 1:], (0, 0, 0, 1))[..., None]  # what the next token will write of this one
        o, S = outer_scan(C, (own[..., None] + late) * B, x, log_decay, S, lengths, chunk_size=self.config.chunk_size)
        o = o - late * (C * B).sum(-1, keepdim=True) * x  # which this one does not read yet
        last = {n: last_tokens(torch.cat([state[n], v], 1), 1, lengths) for n, v in (("B", B), ("x", x))}
        tokens = u.shape[1] if lengths is None else lengths
        angle = torch.cat([state["angle"][:, None], angle], 1)[:, -1]
        return self._out(o, x, z), state.advance(tokens, S=S, angle=angle, **last)

    def step(self, u: Float[Tensor, "B 1 D"], state: State):
        z, x, B, C, angle, log_decay, late, own = self._selected(u, state["angle"], None)
        o, S = outer_step(C, own[..., None] * B, x, log_decay, self._with_last(state, late))
        return self._out(o, x, z), state.advance(1, S=S, angle=angle[:, 0], B=B, x=x)

    def _selected(self, u: Tensor, angle: Tensor, lengths: Tensor | None) -> tuple[Tensor, ...]:
        """z; x, B, C by heads, turned; angles; log decay; (1 - lam) dt and lam dt. All but z in float32 at least."""
        z, x, B, C, dt, a, lam, theta = self.in_proj(u).split(self.widths, -1)
        wide = torch.promote_types(u.dtype, torch.float32)
        dt, lam = F.softplus(dt.to(wide) + self.dt_bias), lam.to(wide).sigmoid()
        turn = zero_padding(math.pi * theta.to(wide).tanh()[..., None, :] * dt[..., None], lengths)
        angle = torch.remainder(angle[:, None] + turn.double().cumsum(1), 2 * math.pi).to(wide)
        B, C = self._by_head(self.B_norm, B, self.B_bias), self._by_head(self.C_norm, C, self.C_bias)
        log_decay = dt * -F.softplus(a.to(wide)).clamp(min=LEAST_RATE)
        late = zero_padding((1 - lam) * dt, lengths)
        x = x.unflatten(-1, (self.n_heads, -1)).to(wide)
        return z, x, _turned(B.to(wide), angle), _turned(C.to(wide), angle), angle, log_decay, late, lam * dt

    def _by_head(self, norm: RMSNorm, x: Tensor, bias: Tensor) -> Float[Tensor, "B T H N"]:
        groups = norm(x.unflatten(-1, (self.config.n_groups, -1)))
        return groups.repeat_interleave(self.n_heads // self.config.n_groups, 2) + bias[:, 0]

    def _with_last(self, state: State, late: Float[Tensor, "B T H"]) -> Float[Tensor, "B H N P"]:
        """The state with what this call's first token, if there is one, writes of the token before."""
        size = late[:, :1].sum(1)[..., None, None]
        return state["S"] + size * state["B"][:, 0, :, :, None] * state["x"][:, 0, :, None]

    def _out(self, o: Tensor, x: Tensor, z: Tensor) -> Tensor:
        o = (o + self.D[:, None] * x).flatten(2).to(z.dtype)
        return self.out_proj(silu_gate(o, z))

    def reference(self, u: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        z, x, B, C, _, log_decay, late, own = self._selected(u, u.new_zeros(len(u), self.n_heads, self.n_angles), None)
        S = written = torch.zeros_like(B[:, 0, ..., None] * x[:, 0, :, None])
        outs = []
        for t in range(u.shape[1]):
            Bx = torch.einsum("bhn,bhp->bhnp", B[:, t], x[:, t])
            decay, beta, gamma = (v[:, t, :, None, None] for v in (log_decay.exp(), late * log_decay.exp(), own))
            S = decay * S + beta * written + gamma * Bx
            outs.append(torch.einsum("bhnp,bhn->bhp", S, C[:, t]))
            written = Bx
        return self._out(torch.stack(outs, 1), x, z)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        head_dim = self.d_inner // self.n_heads
        return outer_flops(T, B, self.n_heads, self.config.d_state, head_dim, mode, "head", self.config.chunk_size)


def _turned(x: Float[Tensor, "B T H N"], angle: Float[Tensor, "B T H A"]) -> Float[Tensor, "B T H N"]:
    """The first A pairs of neighbouring channels, each turned by its angle."""
    turned, rest = x.split([2 * angle.shape[-1], x.shape[-1] - 2 * angle.shape[-1]], -1)
    even, odd = turned[..., ::2], turned[..., 1::2]
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    return torch.cat([turned, rest], -1)
