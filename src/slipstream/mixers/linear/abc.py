r"""ABC: softmax attention over a bounded memory, whose slots are weighted means of everything so far.

    K_t = sum_{i<=t} softmax_i(s_i) k_i^T        V_t = sum_{i<=t} softmax_i(s_i) v_i^T        one softmax for each slot
    o_t = V_t^T softmax(K_t q_t / sqrt(K))

    s_t = W_s x_t        q, k = rope(W x)        y_t = W_o (rmsnorm(o_t) * silu(W_g x_t))

Kept as z_t = log sum_{i<=t} exp(s_i), so that nothing overflows: a token takes the share sigmoid(s_t - z_{t-1}) of a slot,
and the slot fades by the rest. Nothing is forgotten but by being outweighed. Weights and defaults are those of fla's
ABCAttention, which clamps s to +-32 and adds the rotation and the output gate; its swish on q, k, v is left out, as it is
there by default. Its decoding begins z anew at every call; this one does not.
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
from slipstream.layers.norm import GatedRMSNorm
from slipstream.layers.rope import rope
from slipstream.ops.slot_scan import slot_flops, slot_scan, slot_step
from slipstream.ops.valid import last_tokens, zero_padding

NOTHING = -1e4  # z before the first token: finite, and so low that the first token takes the whole slot


class ABC(Mixer, name="abc", family="linear"):
    paper = "Peng, Kasai, Pappas, Yogatama, Wu, Kong, et al. 2021, arXiv:2110.02488; layer as in fla 0.6.0"
    use_when = (
        "a summary of all that was read is to be attended to, in constant memory, and nothing needs to be forgotten"
    )
    train_order, decode_order = "T", "1"
    writes, erases = "exp(s - z) k^T, exp(s - z) v^T", "nothing"
    decays, reads = "a number a slot, from all of s so far", "V^T softmax(K q)"
    symbols = {"K": "K transposed", "V": "V", "phi": "exp(s)", "n": "n_slots"}
    oracle = "naive_recurrent_abc of fla 0.6.0 inside its layer, tests/oracles/slot_attention.npz"

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        expand_k: float = 0.5  # width of all keys as a multiple of d_model
        n_slots: int = 64  # slots per head
        rope_base: float | None = 10000.0  # base of the rotary positions; None for none
        clamp: float = 32.0  # s is kept within +-clamp
        conv_size: int = 0  # width of a short convolution on q, k and v; 0 for none, as in the paper
        norm_eps: float = 1e-5  # of the output norm
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_heads=2, n_slots=5, conv_size=3, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads = heads(config.d_model, config.n_heads)
        k_width = round(config.d_model * config.expand_k)
        self.k_head_dim, self.v_head_dim = k_width // self.n_heads, config.d_model // self.n_heads
        if k_width % self.n_heads or (config.rope_base and self.k_head_dim % 2):
            raise InputError(
                f"key width {k_width} (d_model * expand_k) is not n_heads {self.n_heads} times an even number"
            )
        add_lines(self, {"q": k_width, "k": k_width, "v": config.d_model}, config.conv_size)
        self.s_proj = Linear(config.d_model, self.n_heads * config.n_slots, bias=False)
        self.g_proj = Linear(config.d_model, config.d_model, bias=False)
        self.g_norm = GatedRMSNorm(self.v_head_dim, config.norm_eps)
        self.o_proj = Linear(config.d_model, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        H, M = self.n_heads, self.config.n_slots
        memory = {"K": Slot((H, self.k_head_dim, M)), "V": Slot((H, M, self.v_head_dim))}
        return {**memory, "z": Slot((H, M), start=NOTHING), **line_slots(self)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        lines, convs = run_lines(self, "qkv", x, state, lengths)
        write, log_decay, z = self._shares(x, state["z"], lengths)
        memory, scale, chunk_size = (state["K"], state["V"]), self.k_head_dim**-0.5, self.config.chunk_size
        q, k, v = self._by_heads(lines, state.length)
        o, (K, V) = slot_scan(q, k, v, write, log_decay, memory, lengths, scale, chunk_size)
        return self._output(o, x), state.advance(x.shape[1] if lengths is None else lengths, K=K, V=V, z=z, **convs)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        lines, convs = run_lines(self, "qkv", x, state, None)
        write, log_decay, z = self._shares(x, state["z"], None)
        q, k, v = self._by_heads(lines, state.length)
        o, (K, V) = slot_step(q, k, v, write, log_decay, (state["K"], state["V"]), self.k_head_dim**-0.5)
        return self._output(o, x), state.advance(1, K=K, V=V, z=z, **convs)

    def _by_heads(self, lines: dict[str, Tensor], past: Int[Tensor, "B"]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (lines[n].unflatten(-1, (self.n_heads, -1)) for n in "qkv")
        if self.config.rope_base:
            positions = past[:, None] + torch.arange(q.shape[1], device=past.device)
            q, k = rope(q, positions, self.config.rope_base), rope(k, positions, self.config.rope_base)
        return q, k, v

    def _slot_logits(self, x: Tensor) -> Float[Tensor, "B T H M"]:
        s = self.s_proj(x).to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (self.n_heads, -1))
        return s.clamp(-self.config.clamp, self.config.clamp)

    def _shares(self, x: Tensor, z: Float[Tensor, "B H M"], lengths: Int[Tensor, "B"] | None):
        """The share of each slot that a token takes, the logarithm of what it leaves, and the last z.

        Not exp(s_t - z_t) and z_{t-1} - z_t: of two large sums that differ by little, float32 keeps few digits.
        """
        s = zero_padding(self._slot_logits(x), lengths)
        so_far = torch.cat([z[:, None].to(s.dtype), s], 1).logcumsumexp(1)
        ahead = s - so_far[:, :-1]
        return ahead.sigmoid(), F.logsigmoid(-ahead), last_tokens(so_far, 1, lengths)[:, 0].to(z.dtype)

    def _output(self, o: Float[Tensor, "B T H V"], x: Tensor) -> Float[Tensor, "B T D"]:
        return self.o_proj(self.g_norm(o, self.g_proj(x).unflatten(-1, o.shape[2:])).flatten(2))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Slot by slot as printed, with the softmax over all tokens so far."""
        q, k, v = self._by_heads(lines_reference(self, "qkv", x), torch.zeros(x.shape[0], dtype=torch.long))
        s, outs = self._slot_logits(x), []
        for t in range(x.shape[1]):
            share = s[:, : t + 1].softmax(1)
            K, V = (torch.einsum("bthm,bthk->bhmk", share, line[:, : t + 1]) for line in (k, v))
            match = torch.einsum("bhmk,bhk->bhm", K, q[:, t]) / self.k_head_dim**0.5
            outs.append(torch.einsum("bhmv,bhm->bhv", V, match.softmax(-1)))
        return self._output(torch.stack(outs, 1), x)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        K, V, M = self.k_head_dim, self.v_head_dim, self.config.n_slots
        return slot_flops(T, B, self.n_heads, K, V, M, mode, self.config.chunk_size)
