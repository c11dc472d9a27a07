r"""RWKV-7 (Goose) time mix: a matrix state with a decay per channel and a generalised delta rule.

    S_t = S_{t-1} (D(w_t) - kappa_t (a_t * kappa_t)^T) + v_t k~_t^T        o_t = S_t r_t

    w_t = exp(-e^(-1/2) sigmoid(LoRA_w))   a_t = sigmoid(LoRA_a)   kappa = unit(k * k_k)   k~ = k * (1 + (a - 1) * k_a)
    y_t = W_o (LoRA_g * (groupnorm_h(o_t) + (r_t . (r_k * k~_t)) v_t))

Every projection reads x_t + mu * (x_{t-1} - x_t) with a mu of its own. The erase reads the state before its decay.
This is the form of a first layer. Later layers of the RWKV-7 models mix in its values of the same tokens, before all else
(value_residual): v_t + sigmoid(LoRA_v) * (v'_t - v_t) in place of v_t. Weights are named as in fla (x_r, r_proj, w_lora, k_k,
g_norm), and drawn as RWKV-LM draws a first layer's, except that o_proj does not start at zero. The channel mix is a mixer of
its own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.lender import Lender, Lent
from slipstream.core.mixer import Mode
from slipstream.core.state import Slot, State
from slipstream.layers.head_norm import HeadNorm
from slipstream.layers.linear import Linear
from slipstream.layers.token_shift import after, blend, ramp, shift_slot
from slipstream.ops.delta_scan import dplr_flops, dplr_scan, dplr_step
from slipstream.ops.valid import last_tokens

SHIFT_POWERS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}  # how mu falls over the channels


class RWKV7(Lender, name="rwkv7", family="delta"):
    paper = "Peng et al. 2025, arXiv:2503.14456, eq. 3-22"
    use_when = "constant memory with state tracking and no attention at all; the layer of the RWKV-7 models"
    writes, erases = "v k~^T", "what is stored under kappa, at a rate a channel"
    decays, reads = "a number a key channel, from x", "S r, and v by r . k~"
    train_order, decode_order = "T", "1"
    symbols = {"wkv": "S transposed", "w": "exp(log_decay)", "kappa": "kk", "rho": "r_k", "xi": "k_k", "alpha": "k_a"}
    oracle = (
        "RWKV_x070_TMix_seq of the rwkv package 0.8.32, stored in tests/oracles/rwkv7.npz; value_residual: all of RWKV_x070, "
        "rwkv7_checkpoint.npz"
    )
    no_weight_decay = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a", "r_k")

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        decay_rank: int | None = None  # rank of the decay's projection; default near 2.5 sqrt(d_model), at least 32
        rate_rank: int | None = None  # rank of the projection of a, the in-context learning rate; default as decay_rank
        value_residual: bool = False  # mixes in the values of the rwkv7 layer before it that does not
        value_rank: int | None = None  # rank of the projection that says how much; default near 1.7 sqrt(d_model)
        gate_rank: int | None = None  # rank of the output gate's projection; default near 5 sqrt(d_model), at least 32
        norm_eps: float = 1e-5  # of the group norm, times head_dim
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_heads=2, decay_rank=3, rate_rank=3, gate_rank=5, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D, self.n_heads = config.d_model, heads(config.d_model, config.n_heads)
        self.head_dim = D // self.n_heads
        for name, power in SHIFT_POWERS.items():
            self.register_parameter(f"x_{name}", nn.Parameter(1 - ramp(D, power)))
        self.r_proj, self.k_proj, self.v_proj, self.o_proj = (Linear(D, D, bias=False) for _ in range(4))
        for proj, gain in ((self.r_proj, 1.0), (self.k_proj, 0.1), (self.v_proj, 1.0)):
            nn.init.orthogonal_(proj.weight, gain)
        rank = _rank(2.5, D, self.head_dim)
        line = torch.linspace(0, 1, D)
        zigzag = torch.linspace(-1, 1, self.head_dim).repeat(self.n_heads)
        zigzag = zigzag * zigzag.abs()
        self.w_lora = LoRA(D, config.decay_rank or rank, nn.Tanh(), -5.5 + 6 * line + 2.5 * zigzag)
        self.a_lora = LoRA(D, config.rate_rank or rank, nn.Identity(), -0.39 + 0.3 * zigzag + 0.4 * line)
        self.v_lora = None
        if config.value_residual:
            value_rank = config.value_rank or _rank(1.7, D, self.head_dim)
            self.v_lora = LoRA(D, value_rank, nn.Identity(), 0.73 - 0.4 * line)
        self.g_lora = LoRA(D, config.gate_rank or _rank(5.0, D, 64), nn.Sigmoid(), None)
        self.k_k, self.k_a = nn.Parameter(0.76 - 0.1 * line), nn.Parameter(torch.full((D,), 1.02))
        self.r_k = nn.Parameter(torch.full((self.n_heads, self.head_dim), -0.04))
        self.g_norm = HeadNorm(self.n_heads, D, config.norm_eps * self.head_dim)

    def slots(self) -> dict[str, Slot]:
        return {"S": Slot((self.n_heads, self.head_dim, self.head_dim)), "shift": shift_slot(self.config.d_model)}

    def share_prefill(
        self,
        x: Float[Tensor, "B T D"],
        state: State,
        lent: Lent | None = None,
        lengths: Int[Tensor, "B"] | None = None,
    ):
        """What is lent: values of these tokens."""
        line = after(state["shift"], x)
        r, log_w, k, v, a, kk, gate = self._project(x, line[:, :-1], lent)
        o, S = dplr_scan(
            r, k, v, -kk, a * kk, log_w, state["S"], lengths, chunk_size=self.config.chunk_size, erase="undecayed"
        )
        tokens = x.shape[1] if lengths is None else lengths
        new = state.advance(tokens, S=S, shift=last_tokens(line, 1, lengths))
        return self._output(o, r, k, v, gate), new, (v,)

    def share_step(self, x: Float[Tensor, "B 1 D"], state: State, lent: Lent | None = None):
        r, log_w, k, v, a, kk, gate = self._project(x, state["shift"].to(x.dtype), lent)
        o, S = dplr_step(r, k, v, -kk, a * kk, log_w, state["S"], erase="undecayed")
        return self._output(o, r, k, v, gate), state.advance(1, S=S, shift=x), (v,)

    def _project(
        self, x: Float[Tensor, "B T D"], previous: Float[Tensor, "B T D"], lent: Lent | None = None
    ) -> tuple[Tensor, ...]:
        """r, log decay, k~, v, a, kappa by heads, and the output gate (B T D)."""
        r, w, k, v, a, g = (blend(x, previous, self.get_parameter(f"x_{n}")) for n in SHIFT_POWERS)
        wide = torch.promote_types(x.dtype, torch.float32)
        log_w = -math.exp(-0.5) * self.w_lora(w).to(wide).sigmoid()
        r, k, v, a = self.r_proj(r), self.k_proj(k), self._values(v, lent), self.a_lora(a).sigmoid()
        kk = F.normalize((k * self.k_k).to(wide).unflatten(-1, self.r_k.shape), dim=-1)
        r, log_w, k, v, a = (t.unflatten(-1, self.r_k.shape) for t in (r, log_w, k * (1 + (a - 1) * self.k_a), v, a))
        return r, log_w, k, v, a, kk, self.g_lora(g)

    def _values(self, x: Float[Tensor, "B T D"], lent: Lent | None) -> Float[Tensor, "B T D"]:
        """Its own, or between these and another layer's."""
        v = self.v_proj(x)
        if self.v_lora is None:
            return v
        if lent is None:
            raise InputError(
                "a layer with value_residual=true reads the values of a layer before it: it runs in a model only"
            )
        return torch.lerp(v, lent[0].flatten(2), self.v_lora(x).sigmoid())

    def _output(self, o: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Float[Tensor, "B T D"]:
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v
        return self.o_proj((self.g_norm(o) + bonus.flatten(2)) * gate)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        r, log_w, k, v, a, kk, gate = self._project(x, F.pad(x, (0, 0, 1, 0))[:, :-1])
        S, outs = x.new_zeros(x.shape[0], self.n_heads, self.head_dim, self.head_dim), []  # (B H V K): the paper's wkv
        for t in range(x.shape[1]):
            erase = torch.einsum("bhi,bhj->bhij", kk[:, t], a[:, t] * kk[:, t])
            S = S @ (torch.diag_embed(log_w[:, t].exp()) - erase) + torch.einsum("bhv,bhk->bhvk", v[:, t], k[:, t])
            outs.append(torch.einsum("bhvk,bhk->bhv", S, r[:, t]))
        return self._output(torch.stack(outs, 1), r, k, v, gate)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return dplr_flops(T, B, self.n_heads, self.head_dim, self.head_dim, mode, "channel", self.config.chunk_size)


class LoRA(nn.Module):
    """W_2 act(W_1 x) + bias; the bias alone at the start."""

    def __init__(self, width: int, rank: int, act: nn.Module, bias: Float[Tensor, "D"] | None) -> None:
        super().__init__()
        first, second = Linear(width, rank, bias=False), Linear(rank, width, bias=bias is not None)
        nn.init.zeros_(first.weight)
        nn.init.orthogonal_(second.weight, 0.1 * max(1.0, width / rank) ** 0.5)
        if bias is not None:
            second.bias.data.copy_(bias)
        self.lora = nn.Sequential(first, act, second)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.lora(x)


def _rank(factor: float, d_model: int, head_dim: int) -> int:
    """A multiple of 32 near factor * sqrt(d_model), more for heads wider than 64."""
    return max(32, round(factor * d_model**0.5 * head_dim / 64 / 32) * 32)
