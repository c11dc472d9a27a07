r"""RWKV-6 (Finch) time mix: as RWKV-5, with a decay and a token shift that the input sets.

    S_t = D(w_t) S_{t-1} + k_t v_t^T        o_t = (S_{t-1} + D(u) k_t v_t^T)^T r_t        w_t = exp(-exp(d_t))

    z_n = x_t + (mu_n + A_n tanh(B_n (x_t + mu_x * e_t))) * e_t,   e_t = x_{t-1} - x_t,   n = w, k, v, r, g
    d_t = d + A_d tanh(B_d z_w)             r_t = W_r z_r,  k_t, v_t, g_t likewise        y_t = W_o (groupnorm_h(o_t) * silu(g_t))

Weights are named and drawn as in RWKV-LM x060 (time_maa_x, time_maa_w1 for all B_n, time_decay_w1, time_faaaa for u, ln_x), as
its first layer's. The channel mix is a mixer of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.head_norm import HeadNorm
from slipstream.layers.linear import Linear
from slipstream.layers.token_shift import after, blend, ramp, shift_slot
from slipstream.ops.outer_scan import outer_flops, outer_scan, outer_step
from slipstream.ops.valid import last_tokens

SHIFT_POWERS = {"w": 1.0, "k": 1.0, "v": 1.0, "r": 0.5, "g": 0.5}  # how the share of this token rises over the channels
FASTEST = 8.0  # of d_t: what fades faster is gone in one token, and exp(d_t) must stay finite


class RWKV6(Mixer, name="rwkv6", family="linear"):
    paper = "Peng et al. 2024, arXiv:2404.05892, sec. 4.2 and 4.3"
    use_when = "constant memory that forgets at rates the input sets, with no convolution; checkpoints of RWKV-6"
    writes, erases = "k v^T", "nothing"
    decays, reads = "a number a key channel, from x", "S^T r before the write, and v by u * k . r"
    train_order, decode_order = "T", "1"
    symbols = {
        "S": "S",
        "u": "time_faaaa",
        "mu": "time_maa",
        "d": "time_decay",
        "A_d": "time_decay_w2",
        "B_d": "time_decay_w1",
    }
    oracle = "att_seq_v6_0 of the rwkv package 0.8.32, stored in tests/oracles/rwkv.npz"
    no_weight_decay = ("time_decay", "time_faaaa", "time_maa_x", *(f"time_maa_{n}" for n in SHIFT_POWERS))

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        shift_rank: int = 32  # rank of each of the five shifts that the input sets
        decay_rank: int = 64  # rank of the decay that the input sets
        norm_eps: float = 64e-5  # of the group norm
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_heads=2, shift_rank=2, decay_rank=3, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D, self.n_heads = config.d_model, heads(config.d_model, config.n_heads)
        self.head_dim = D // self.n_heads
        for name, power in ({"x": 1.0} | SHIFT_POWERS).items():
            self.register_parameter(f"time_maa_{name}", nn.Parameter(1 - ramp(D, power)))
        self.time_maa_w1 = nn.Parameter(torch.zeros(D, len(SHIFT_POWERS) * config.shift_rank))
        self.time_maa_w2 = nn.Parameter(torch.empty(len(SHIFT_POWERS), config.shift_rank, D).uniform_(-0.01, 0.01))
        self.time_decay = nn.Parameter((-6 + 5 * torch.linspace(0, 1, D) ** 0.7).view(1, 1, D))
        self.time_decay_w1 = nn.Parameter(torch.zeros(D, config.decay_rank))
        self.time_decay_w2 = nn.Parameter(torch.empty(config.decay_rank, D).uniform_(-0.01, 0.01))
        self.time_faaaa = nn.Parameter((0.1 * ((torch.arange(D) + 1) % 3 - 1)).view(self.n_heads, self.head_dim))
        self.receptance, self.key, self.value, self.gate, self.output = (Linear(D, D, bias=False) for _ in range(5))
        self.ln_x = HeadNorm(self.n_heads, D, config.norm_eps)

    def slots(self) -> dict[str, Slot]:
        return {"S": Slot((self.n_heads, self.head_dim, self.head_dim)), "shift": shift_slot(self.config.d_model)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        line = after(state["shift"], x)
        r, k, v, log_w, gate = self._project(x, line[:, :-1])
        tokens = x.shape[1] if lengths is None else lengths
        o, S = outer_scan(r, k, v, log_w, state["S"], lengths, chunk_size=self.config.chunk_size, bonus=self.time_faaaa)
        return self._output(o, gate), state.advance(tokens, S=S, shift=last_tokens(line, 1, lengths))

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        r, k, v, log_w, gate = self._project(x, state["shift"].to(x.dtype))
        o, S = outer_step(r, k, v, log_w, state["S"], bonus=self.time_faaaa)
        return self._output(o, gate), state.advance(1, S=S, shift=x)

    def _project(self, x: Float[Tensor, "B T D"], previous: Float[Tensor, "B T D"]) -> tuple[Tensor, ...]:
        """r, k, v, log decay by heads, and the output gate (B T D)."""
        low = (
            (blend(x, previous, self.get_parameter("time_maa_x")) @ self.time_maa_w1)
            .tanh()
            .unflatten(-1, (len(SHIFT_POWERS), -1))
        )
        mus = (
            self.get_parameter(f"time_maa_{n}") + a @ up
            for n, a, up in zip(SHIFT_POWERS, low.unbind(-2), self.time_maa_w2)
        )
        w, k, v, r, g = (blend(x, previous, mu) for mu in mus)
        d = self.time_decay + (w @ self.time_decay_w1).tanh() @ self.time_decay_w2
        log_w = -d.to(torch.promote_types(x.dtype, torch.float32)).clamp(max=FASTEST).exp()
        lines = self.receptance(r), self.key(k), self.value(v), log_w
        return *(t.unflatten(-1, (self.n_heads, self.head_dim)) for t in lines), F.silu(self.gate(g))

    def _output(self, o: Float[Tensor, "B T H V"], gate: Tensor) -> Float[Tensor, "B T D"]:
        return self.output(self.ln_x(o) * gate)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        r, k, v, log_w, gate = self._project(x, F.pad(x, (0, 0, 1, 0))[:, :-1])
        S, outs = k.new_zeros(*k[:, 0].shape, self.head_dim), []
        for t in range(x.shape[1]):
            kv = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
            outs.append(torch.einsum("bhkv,bhk->bhv", S + self.time_faaaa[..., None] * kv, r[:, t]))
            S = torch.diag_embed(log_w[:, t].exp()) @ S + kv
        return self._output(torch.stack(outs, 1), gate)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        low_rank = sum(w.numel() for w in (self.time_maa_w1, self.time_maa_w2, self.time_decay_w1, self.time_decay_w2))
        state = outer_flops(T, B, self.n_heads, self.head_dim, self.head_dim, mode, "channel", self.config.chunk_size)
        return state + 2.0 * low_rank * B * (1 if mode == "step" else T)
