r"""LMU: a fixed linear memory of the last theta tokens, in Legendre polynomials, beside a small tanh network.

    u_t = e_x x_t + e_h h_{t-1} + e_m m_{t-1}          m_t = A m_{t-1} + B u_t
    h_t = tanh(W_x x_t + W_h h_{t-1} + W_m m_t)

    theta dm/dt = a m + b u    a_ij = (2i+1) (-1 if i < j else (-1)^(i-j+1))    b_i = (2i+1) (-1)^i
    A = exp(a / theta)         B = a^{-1} (A - I) b                              (zero-order hold over one token)

The paper writes one signal u into one memory of d_state numbers; here n_memories signals each have theirs, as in the authors'
keras-lmu (memory_d). A and B are not learned. h feeds u, so time cannot be run in parallel; but h and m together are
one recurrence with one matrix, so a token costs one product. e_m starts at 0, as in the authors' code;
nothing keeps what is learned in e_m and e_h from making the memory grow.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.ops.semilinear_scan import semilinear_flops, semilinear_scan


class LMU(Mixer, name="lmu", family="rnn"):
    paper = (
        "Voelker, Kajic & Eliasmith 2019, NeurIPS 32, Legendre Memory Units; initialisation: the authors' lmu package"
    )
    use_when = "signals must be remembered over a known, long time with few numbers: sensors, control, delays"
    writes, erases = "B u, with u from x, h and m", "nothing"
    decays, reads = "by the fixed A: what is older than theta tokens", "tanh(W_x x + W_h h + W_m m)"
    symbols = {"d": "d_state", "n": "d_hidden", "e": "e_x, e_h, e_m", "W": "W_x, W_h, W_m"}
    oracle = "golden arrays of a loop in numpy with another discretisation of A and B, tests/oracles/test_linear_rnn_oracles.py"

    class Config(MixerConfig):
        d_hidden: int | None = None  # width of the tanh network; default d_model
        n_memories: int | None = None  # signals that are remembered; default d_model / 16 (the paper has 1)
        d_state: int = 16  # Legendre polynomials a memory
        theta: float = 64.0  # tokens a memory spans

    config: Config
    tiny = Config(d_model=16, d_hidden=24, n_memories=2, d_state=5, theta=9.0)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.theta < 1 or config.d_state < 1:
            raise InputError(f"lmu takes theta >= 1 and d_state >= 1; got {config.theta} and {config.d_state}")
        D, H = config.d_model, config.d_hidden or config.d_model
        n = config.n_memories or max(1, D // 16)
        self.d_hidden, self.n_memories, M = H, n, n * config.d_state
        # Kept in float64 whatever the weights are: rounded to bfloat16 the memory would drift.
        self.A, self.B = legendre_memory(config.d_state, config.theta)
        self.e_x, self.e_h = (nn.Parameter(torch.empty(n, w).uniform_(-1, 1) * (3 / w) ** 0.5) for w in (D, H))
        self.e_m = nn.Parameter(torch.zeros(n, M))
        self.W_x, self.W_h, self.W_m = (nn.Parameter(nn.init.xavier_normal_(torch.empty(H, w))) for w in (D, H, M))
        self.out_proj = nn.Identity() if H == D else Linear(H, D, bias=False)

    def slots(self) -> dict[str, Slot]:
        return {"h": Slot((self.d_hidden,)), "m": Slot((self.n_memories, self.config.d_state))}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        into_m = ((x @ self.e_x.T)[..., None] * self.B.to(x)).flatten(2)
        into = torch.cat([x @ self.W_x.T + into_m @ self.W_m.T, into_m], -1)
        start = torch.cat([state["h"], state["m"].flatten(1)], 1)
        s, last = semilinear_scan(into, self._matrix(start), self.d_hidden, start, lengths)
        h, m = last.split([self.d_hidden, start.shape[1] - self.d_hidden], 1)
        state = state.advance(x.shape[1] if lengths is None else lengths, h=h, m=m.unflatten(1, (self.n_memories, -1)))
        return self.out_proj(s[..., : self.d_hidden]), state

    def _matrix(self, like: Tensor) -> Float[Tensor, "S S"]:
        """What takes (h, m) of one token to the next before the tanh: m's rows, and h's, which see m through W_m."""
        wide = {n: p.to(like) for n, p in self.named_parameters() if n.startswith(("e_", "W_"))}
        write = torch.cat([wide["e_h"], wide["e_m"]], 1)[:, None] * self.B.to(like)[:, None]
        keep = torch.block_diag(*[self.A.to(like)] * self.n_memories)
        to_m = write.flatten(0, 1) + nn.functional.pad(keep, (self.d_hidden, 0))
        to_h = wide["W_m"] @ to_m + nn.functional.pad(wide["W_h"], (0, len(keep)))
        return torch.cat([to_h, to_m])

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        h, m = self._next(x[:, 0].to(state["h"].dtype), state["h"], state["m"])
        return self.out_proj(h.to(x.dtype))[:, None], state.advance(1, h=h, m=m)

    def _next(
        self, x: Float[Tensor, "B D"], h: Float[Tensor, "B H"], m: Float[Tensor, "B M N"]
    ) -> tuple[Tensor, Tensor]:
        """The printed equation; for one token cheaper than to make one matrix of it."""
        u = x @ self.e_x.T.to(x) + h @ self.e_h.T.to(h) + m.flatten(1) @ self.e_m.T.to(m)
        m = m @ self.A.T.to(m) + u[..., None] * self.B.to(m)
        h = torch.tanh(x @ self.W_x.T.to(x) + h @ self.W_h.T.to(h) + m.flatten(1) @ self.W_m.T.to(m))
        return h, m

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        h, m, hs = x.new_zeros(len(x), self.d_hidden), x.new_zeros(len(x), self.n_memories, self.config.d_state), []
        for t in range(x.shape[1]):
            h, m = self._next(x[:, t], h, m)
            hs.append(h)
        return self.out_proj(torch.stack(hs, 1))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        H, M, inner = (
            self.d_hidden,
            self.n_memories * self.config.d_state,
            sum(p.numel() for p in (self.W_h, self.e_h, self.e_m)),
        )
        each = self.e_x.numel() + self.W_x.numel() + self.W_m.numel()
        if mode == "step":
            return 2.0 * B * (each + inner + M * self.config.d_state)
        return 2.0 * (B * T * each + H * M * (H + M)) + semilinear_flops(B * T, H + M)


def legendre_memory(order: int, theta: float) -> tuple[Float[Tensor, "N N"], Float[Tensor, "N"]]:
    """A and B: both blocks of the exponential of [[a, b], [0, 0]] / theta."""
    i = torch.arange(order, dtype=torch.float64)
    sign = torch.where(i[:, None] < i, -1.0, (-1.0) ** (i[:, None] - i + 1))
    both = torch.zeros(order + 1, order + 1, dtype=torch.float64)
    both[:order, :order], both[:order, order] = (2 * i[:, None] + 1) * sign, (2 * i + 1) * (-1.0) ** i
    both = torch.linalg.matrix_exp(both / theta)
    return both[:order, :order], both[:order, order]
