r"""Gated slot attention (GSA): softmax attention over a few slots, which every token fades and refills.

    K_t = D(alpha_t) K_{t-1} + (1 - alpha_t) k_t^T        V_t = D(alpha_t) V_{t-1} + (1 - alpha_t) v_t^T
    o_t = V_t^T softmax(K_t q_t)

    alpha_t = sigmoid(W_f x_t)^(1/8)        q, k, v = silu(W x)        y_t = W_o rmsnorm(silu(o_t))

What fades in a slot and what is written to it sum to one, so a slot is a moving average. The norm is over all heads
at once. Weights are named as in fla (q_proj, k_proj, v_proj, f_proj, g_norm, o_proj), whose defaults these are. There
is no output gate, and no T2R feature map: both are off in the published models.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.lines import add_lines, line_slots, lines_reference, run_lines
from slipstream.layers.norm import RMSNorm
from slipstream.ops.slot_scan import slot_flops, slot_scan, slot_step


class GatedSlotAttention(Mixer, name="gated_slot_attention", family="linear"):
    paper = "Zhang, Yang, Zhu, Zhang, Cui, Wang, et al. 2024, arXiv:2409.07146, sec. 3"
    use_when = (
        "softmax attention is wanted, or was trained, and a small constant memory must do: recall is high for its size"
    )
    train_order, decode_order = "T", "1"
    writes, erases = "(1 - alpha) k^T, (1 - alpha) v^T", "nothing"
    decays, reads = "a number a slot, from x", "V^T softmax(K q)"
    symbols = {"K": "K transposed", "V": "V", "alpha": "exp(log_decay)", "m": "n_slots", "tau": "gate_normaliser"}
    oracle = "naive_recurrent_gsa of fla 0.6.0 inside its layer, tests/oracles/slot_attention.npz"

    class Config(MixerConfig):
        n_heads: int | None = None  # query heads; default d_model / 64
        n_kv_heads: int | None = None  # heads with slots of their own, each for a group of query heads; default n_heads
        n_slots: int = 64  # slots per head
        gate_normaliser: float = 8.0  # the gate's logarithm is divided by this, which keeps it near 1
        conv_size: int = 0  # width of a short convolution on q, k and v; 0 for none, as in the paper
        norm_eps: float = 1e-5  # of the output norm
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_heads=4, n_kv_heads=2, n_slots=5, gate_normaliser=2.0, conv_size=3, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads = heads(config.d_model, config.n_heads)
        self.n_kv_heads = config.n_kv_heads or self.n_heads
        self.head_dim = config.d_model // self.n_heads
        if self.n_heads % self.n_kv_heads:
            raise InputError(f"n_heads {self.n_heads} does not divide into n_kv_heads {self.n_kv_heads} groups")
        kv_width = self.n_kv_heads * self.head_dim
        add_lines(self, {"q": config.d_model, "k": kv_width, "v": kv_width}, config.conv_size)
        self.f_proj = Linear(config.d_model, self.n_kv_heads * config.n_slots, bias=False)
        self.g_norm = RMSNorm(config.d_model, config.norm_eps)
        self.o_proj = Linear(config.d_model, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        H, M = self.n_heads, self.config.n_slots
        return {"K": Slot((H, self.head_dim, M)), "V": Slot((H, M, self.head_dim)), **line_slots(self)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        lines, convs = run_lines(self, "qkv", x, state, lengths)
        memory, chunk_size = (state["K"], state["V"]), self.config.chunk_size
        o, (K, V) = slot_scan(*self._by_heads(lines), *self._gates(x), memory, lengths, chunk_size=chunk_size)
        return self._output(o), state.advance(x.shape[1] if lengths is None else lengths, K=K, V=V, **convs)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        lines, convs = run_lines(self, "qkv", x, state, None)
        o, (K, V) = slot_step(*self._by_heads(lines), *self._gates(x), (state["K"], state["V"]))
        return self._output(o), state.advance(1, K=K, V=V, **convs)

    def _by_heads(self, lines: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (F.silu(lines[n]).unflatten(-1, (-1, self.head_dim)) for n in "qkv")
        return q, self._for_groups(k), self._for_groups(v)

    def _for_groups(self, t: Float[Tensor, "B T G K"]) -> Float[Tensor, "B T H K"]:
        return t.repeat_interleave(self.n_heads // self.n_kv_heads, 2)

    def _gates(self, x: Tensor) -> tuple[Float[Tensor, "B T H M"], Float[Tensor, "B T H M"]]:
        """What is written to each slot, and its log decay."""
        logits = self.f_proj(x).to(torch.promote_types(x.dtype, torch.float32))
        log_alpha = F.logsigmoid(logits).unflatten(-1, (self.n_kv_heads, -1)) / self.config.gate_normaliser
        return self._for_groups(-torch.expm1(log_alpha)), self._for_groups(log_alpha)

    def _output(self, o: Float[Tensor, "B T H V"]) -> Float[Tensor, "B T D"]:
        return self.o_proj(self.g_norm(F.silu(o.flatten(2))))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self._by_heads(lines_reference(self, "qkv", x))
        alpha = self._for_groups(self.f_proj(x).unflatten(-1, (self.n_kv_heads, -1)).sigmoid())
        alpha = alpha.pow(1 / self.config.gate_normaliser)[..., None]
        K = V = x.new_zeros(x.shape[0], self.n_heads, self.config.n_slots, self.head_dim)
        outs = []
        for t in range(x.shape[1]):
            K = alpha[:, t] * K + (1 - alpha[:, t]) * k[:, t, :, None]
            V = alpha[:, t] * V + (1 - alpha[:, t]) * v[:, t, :, None]
            outs.append(torch.einsum("bhmv,bhm->bhv", V, torch.einsum("bhmk,bhk->bhm", K, q[:, t]).softmax(-1)))
        return self._output(torch.stack(outs, 1))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        K, M = self.head_dim, self.config.n_slots
        return slot_flops(T, B, self.n_heads, K, K, M, mode, self.config.chunk_size)
