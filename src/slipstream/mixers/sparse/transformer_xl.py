r"""Transformer-XL: segments that also see the one before them, and positions by distance alone.

    o_t = sum_{s in G(t)} softmax_s(((q_t + u) . k_s + (q_t + b) . W_r R_{t-s}) / sqrt(K)) v_s
    G(t) = {s <= t : s in the segment of t, or in the m segments before it}
    R_d = (sin(d f_0), sin(d f_1), ..., cos(d f_0), cos(d f_1), ...)        f_i = 10000^(-2i / D)

Segments begin at multiples of their length, so that a token sees the same past however a text is cut: between m and m + 1
segments of it, as in the paper's training with a memory of m segments. (Its evaluation slides the memory token by token
instead.) What is stored is keys and values, not the hidden states they are made of: the same numbers, made once. Gradients
flow into the memory within one sequence, where the paper stops them at each segment. Layer by layer the reach adds up.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.ops.index_sets import Segments
from slipstream.ops.relative_attention import reference as relative_reference
from slipstream.ops.relative_attention import relative_attention, relative_attention_flops
from slipstream.ops.valid import last_tokens, zero_padding


class TransformerXL(Mixer, name="transformer_xl", family="sparse"):
    paper = "Dai et al. 2019, arXiv:1901.02860, sec. 3.2 and 3.3"
    use_when = "the last segments are enough, exactly, and memory must not grow; distances matter and positions do not"
    writes, erases = "k and v, beside those of the last segments", "nothing"
    decays, reads = "a segment, all at once, when it is too old", "softmax(K (q + u) + R W_r^T (q + b))^T V"
    symbols = {
        "u": "u",
        "v (the paper's second bias)": "b",
        "W_{k,R}": "r_proj",
        "L": "segment",
        "M": "segment * n_memory",
    }
    oracle = "a float64 loop over the paper's equations, tests/oracles/sparse_patterns.npz"
    no_weight_decay = ("u", "b")

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        segment: int = Field(128, ge=1)  # tokens of a segment
        n_memory: int = Field(1, ge=0)  # m: segments seen before one's own

    config: Config
    tiny = Config(d_model=16, n_heads=4, segment=6, n_memory=1)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D, self.n_heads = config.d_model, heads(config.d_model, config.n_heads)
        self.head_dim = D // self.n_heads
        self.segments = Segments(config.segment, config.n_memory)
        self.span = config.segment * (config.n_memory + 1)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Linear(D, D, bias=False) for _ in range(4))
        self.r_proj = nn.Parameter(torch.empty(self.n_heads, self.head_dim, D).normal_(std=0.02))
        self.u, self.b = (nn.Parameter(torch.empty(self.n_heads, self.head_dim).normal_(std=0.02)) for _ in range(2))

    def slots(self) -> dict[str, Slot]:
        line = Slot((self.span - 1, self.n_heads, self.head_dim), dtype=None)
        return {"k": line, "v": line}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        q, new_k, new_v = self._by_heads(x)
        p, r = self._to_distances(q + self.b)
        k, v = (torch.cat([state[n], zero_padding(new, lengths)], 1) for n, new in (("k", new_k), ("v", new_v)))
        reach = self.span - 1
        o = relative_attention(q + self.u, p, k, v, r, self.segments, state.length, state.length - reach)
        state = state.advance(
            x.shape[1] if lengths is None else lengths,
            k=last_tokens(k, reach, lengths),
            v=last_tokens(v, reach, lengths),
        )
        return self.o_proj(o.flatten(2)), state

    def _by_heads(self, x: Float[Tensor, "B T D"]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (proj(x).unflatten(2, (self.n_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def _to_distances(self, p: Float[Tensor, "B T H K"]) -> tuple[Float[Tensor, "B T H P"], Float[Tensor, "#H P n"]]:
        """Two tensors whose product is p . W_r R_d for all distances d. One query is turned, not all distances."""
        R = self._distances(p)
        if p.shape[1] == 1:
            return torch.einsum("bthk,hkd->bthd", p, self.r_proj), R.mT[None]
        return p, self.r_proj @ R.mT

    def _distances(self, like: Tensor) -> Float[Tensor, "n D"]:
        D, wide = self.config.d_model, torch.promote_types(like.dtype, torch.float32)
        f = 10000.0 ** (-torch.arange(0, D, 2, device=like.device, dtype=wide) / D)
        angle = torch.arange(self.span, device=like.device, dtype=wide)[:, None] * f
        return torch.cat([angle.sin(), angle.cos()], 1)[:, :D].to(like.dtype)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self._by_heads(x)
        r = torch.einsum("hkd,nd->hkn", self.r_proj, self._distances(x))
        return self.o_proj(relative_reference(q + self.u, q + self.b, k, v, r, self.segments).flatten(2))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        D, H, K = self.config.d_model, self.n_heads, self.head_dim
        if mode == "step":
            return 2.0 * B * D * D + relative_attention_flops(1, B, H, K, D, self.segments)
        return 2.0 * D * D * self.span + relative_attention_flops(T, B, H, K, K, self.segments)
