r"""RWKV-5 (Eagle) time mix: a matrix state that fades at a learned rate a key channel, read before the token is added.

    S_t = D(w) S_{t-1} + k_t v_t^T        o_t = (S_{t-1} + D(u) k_t v_t^T)^T r_t        w = exp(-exp(time_decay))

    y_t = W_o (groupnorm_h(o_t) * silu(g_t))        r_t = W_r (m_r * x_t + (1 - m_r) * x_{t-1}),  k_t, v_t, g_t likewise

Weights are named and drawn as in RWKV-LM v5.2 (time_mix_k, time_faaaa for u, ln_x), as its first layer's. Its division by 8
before the group norm is in norm_eps. The channel mix is a mixer of its own.
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

SHIFT_POWERS = {"k": 1.0, "v": 1.0, "r": 0.5, "g": 0.5}  # how the share of this token rises over the channels


class RWKV5(Mixer, name="rwkv5", family="linear"):
    paper = "Peng et al. 2024, arXiv:2404.05892, sec. 4.1"
    use_when = "constant memory with fading at learned fixed rates, cheap to train; checkpoints of RWKV-5"
    writes, erases = "k v^T", "nothing"
    decays, reads = "a fixed number a key channel", "S^T r before the write, and v by u * k . r"
    train_order, decode_order = "T", "1"
    symbols = {"S": "S", "w": "exp(-exp(time_decay))", "u": "time_faaaa", "m_r": "time_mix_r"}
    oracle = "att_seq_v5_2 of the rwkv package 0.8.32, stored in tests/oracles/rwkv.npz"
    no_weight_decay = ("time_decay", "time_faaaa", *(f"time_mix_{n}" for n in SHIFT_POWERS))

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        norm_eps: float = 64e-5  # of the group norm
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_heads=2, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D, self.n_heads = config.d_model, heads(config.d_model, config.n_heads)
        self.head_dim = D // self.n_heads
        for name, power in SHIFT_POWERS.items():
            self.register_parameter(f"time_mix_{name}", nn.Parameter(ramp(D, power)))
        by_head = self.n_heads, self.head_dim
        self.time_decay = nn.Parameter((-6 + 5 * torch.linspace(0, 1, D) ** 0.7).view(by_head))
        self.time_faaaa = nn.Parameter((0.1 * ((torch.arange(D) + 1) % 3 - 1)).view(by_head))
        self.receptance, self.key, self.value, self.gate, self.output = (Linear(D, D, bias=False) for _ in range(5))
        self.ln_x = HeadNorm(self.n_heads, D, config.norm_eps)

    def slots(self) -> dict[str, Slot]:
        return {"S": Slot((self.n_heads, self.head_dim, self.head_dim)), "shift": shift_slot(self.config.d_model)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        line = after(state["shift"], x)
        r, k, v, gate = self._project(x, line[:, :-1])
        log_w, tokens = self._log_decay(x).expand_as(k), x.shape[1] if lengths is None else lengths
        o, S = outer_scan(r, k, v, log_w, state["S"], lengths, chunk_size=self.config.chunk_size, bonus=self.time_faaaa)
        return self._output(o, gate), state.advance(tokens, S=S, shift=last_tokens(line, 1, lengths))

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        r, k, v, gate = self._project(x, state["shift"].to(x.dtype))
        o, S = outer_step(r, k, v, self._log_decay(x).expand_as(k), state["S"], bonus=self.time_faaaa)
        return self._output(o, gate), state.advance(1, S=S, shift=x)

    def _project(self, x: Float[Tensor, "B T D"], previous: Float[Tensor, "B T D"]) -> tuple[Tensor, ...]:
        """r, k, v by heads, and the output gate (B T D)."""
        k, v, r, g = (blend(previous, x, self.get_parameter(f"time_mix_{n}")) for n in SHIFT_POWERS)
        by_heads = (t.unflatten(-1, self.time_decay.shape) for t in (self.receptance(r), self.key(k), self.value(v)))
        return *by_heads, F.silu(self.gate(g))

    def _log_decay(self, like: Tensor) -> Float[Tensor, "H K"]:
        return -self.time_decay.to(torch.promote_types(like.dtype, torch.float32)).exp()

    def _output(self, o: Float[Tensor, "B T H V"], gate: Tensor) -> Float[Tensor, "B T D"]:
        return self.output(self.ln_x(o) * gate)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        r, k, v, gate = self._project(x, F.pad(x, (0, 0, 1, 0))[:, :-1])
        w, u = self._log_decay(x).exp()[..., None], self.time_faaaa[..., None]
        S, outs = k.new_zeros(*k[:, 0].shape, self.head_dim), []
        for t in range(x.shape[1]):
            kv = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
            outs.append(torch.einsum("bhkv,bhk->bhv", S + u * kv, r[:, t]))
            S = w * S + kv
        return self._output(torch.stack(outs, 1), gate)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return outer_flops(T, B, self.n_heads, self.head_dim, self.head_dim, mode, "channel", self.config.chunk_size)
