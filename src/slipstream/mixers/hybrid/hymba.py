r"""Hymba: attention heads and Mamba heads read the same token side by side; their outputs are normed and averaged.

    q, k, v, x, z = W_in u                              a_t = sum_{s in meta, t-W < s <= t} softmax_s(q_t . k_s / sqrt(K)) v_s
    m = Mamba(x, z), from the state h_meta              y = W_out (norm(a) + norm(m)) / 2

Before the first token stand n_meta learned ones, which every token sees: here as what they leave behind, the keys and values
of theirs and the state of Mamba after them (the paper calls them a learned initial cache), so that no layer reads them anew.
The paper's model learns them once, before its first layer. A few layers there see everything: give them a window as long as the
texts. Not here: neighbours that share keys and values. Values are `expand` times as wide as keys, so that both outputs are.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.mamba_block import Gated, one_token
from slipstream.layers.norm import RMSNorm
from slipstream.layers.rope import rope
from slipstream.layers.selection import add_selection, before_softplus, selected
from slipstream.layers.short_conv import ShortConv
from slipstream.ops.index_sets import Global, IndexSet, Window
from slipstream.ops.index_tiles import pairs
from slipstream.ops.selective_scan import reference as selective_reference
from slipstream.ops.selective_scan import selective_scan, selective_scan_flops, selective_step
from slipstream.ops.sparse_attention import sparse_attention
from slipstream.ops.valid import last_tokens, zero_padding


class Hymba(Mixer, name="hymba", family="hybrid"):
    paper = "Dong et al. 2024, Hymba, arXiv:2411.13676, sec. 2; norms and widths as in the authors' code"
    use_when = "a small model should recall what is near exactly and keep the rest in a constant state, in every layer"
    writes, erases = "k and v, beside the last W; dt x B^T", "nothing"
    decays, reads = "of h a number a channel and state, from x", "norm(softmax(K q)^T V) + norm(h C)"
    symbols = {
        "W": "window",
        "meta": "meta_k, meta_v, meta_h, meta_conv",
        "norm": "pre_avg_layernorm1, pre_avg_layernorm2",
    }
    oracle = "a numpy loop over the meta tokens and then the text, tests/oracles/hybrids.npz"
    no_weight_decay = ("A_log", "D", "bias", "meta_k", "meta_v", "meta_h", "meta_conv")

    class Config(MixerConfig):
        n_heads: int | None = None  # attention heads; default d_model / 64
        n_kv_heads: int | None = None  # key and value heads, each for a group of query heads; default n_heads
        window: int = Field(256, ge=1)  # tokens that attention sees, the current one included; 1024 in the paper
        n_meta: int = Field(128, ge=1)  # learned tokens before the first
        rope_base: float | None = 10000.0  # base of the rotary positions; None for no positions
        expand: int = 2  # inner width / d_model, of Mamba and of all values together
        d_state: int = 16  # numbers of state per inner channel
        conv_size: int = 4  # width of the short convolution before Mamba
        dt_rank: int | None = None  # width through which the step size is made; default d_model / 16
        norm_eps: PositiveFloat = 1e-6  # added under the roots of all norms
        chunk_size: int = 16  # tokens of Mamba expanded at a time; no result depends on it

    config: Config
    x_proj: Linear
    dt_proj: Linear
    A_log: nn.Parameter
    dt_layernorm: RMSNorm | None
    b_layernorm: RMSNorm | None
    c_layernorm: RMSNorm | None
    tiny = Config(d_model=16, n_heads=4, n_kv_heads=2, window=5, n_meta=3, d_state=4, conv_size=3, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D, self.inner = config.d_model, config.expand * config.d_model
        self.n_heads = heads(D, config.n_heads)
        self.n_kv_heads, self.head_dim = config.n_kv_heads or self.n_heads, D // self.n_heads
        if self.n_heads % self.n_kv_heads or (config.rope_base and self.head_dim % 2):
            raise InputError(
                f"n_heads {self.n_heads} must divide into n_kv_heads {self.n_kv_heads}, heads have an even width"
            )
        kv = self.n_kv_heads * self.head_dim
        self.widths = [D, kv, config.expand * kv, self.inner, self.inner]
        self.in_proj = Linear(D, sum(self.widths), bias=False)
        self.conv1d = ShortConv(self.inner, config.conv_size, bias=True)
        add_selection(self, D, self.inner, config.d_state, config.dt_rank, config.norm_eps)
        self.D = nn.Parameter(torch.ones(self.inner))
        for name, slot in self.slots().items():
            width = (config.n_meta, *slot.dims[1:]) if name in "kv" else slot.dims
            learned = torch.randn(width) * 3**-0.5 if name in "kv" else torch.zeros(width)  # as W_in of a random token
            self.register_parameter(f"meta_{name}", nn.Parameter(learned))
        self.pre_avg_layernorm1, self.pre_avg_layernorm2 = (RMSNorm(self.inner, config.norm_eps) for _ in range(2))
        self.out_proj = Linear(self.inner, D, bias=False)

    def slots(self) -> dict[str, Slot]:
        reach, G, K = self.config.window - 1, self.n_kv_heads, self.head_dim
        k, v = Slot((reach, G, K), dtype=None), Slot((reach, G, self.config.expand * K), dtype=None)
        return {"k": k, "v": v, "h": Slot((self.inner, self.config.d_state)), "conv": self.conv1d.slot()}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        h = self._entering("h", state)

        def recurrence(x: Tensor, D: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
            return selective_scan(x, *before_softplus(self, x), h, lengths, self.config.chunk_size, False, True, D, z)

        return self._both(x, state, lengths, recurrence)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        h = self._entering("h", state)
        return self._both(x, state, None, one_token(lambda x: selective_step(x, *selected(self, x), h)))

    def _both(self, u: Tensor, state: State, lengths: Tensor | None, recurrence: Gated):
        q, k, v, x, z = self._projected(u, state.length[:, None] + torch.arange(u.shape[1], device=u.device))
        a, kept = self._attend(q, k, v, state, lengths)
        x, conv = self.conv1d(x, self._entering("conv", state), lengths)
        m, h = recurrence(x, self.D, z)
        return self._average(a, m), state.advance(u.shape[1] if lengths is None else lengths, h=h, conv=conv, **kept)

    def _entering(self, name: str, state: State) -> Tensor:
        """What the meta tokens left, for rows that have read nothing yet."""
        fresh = (state.length == 0).reshape(-1, 1, 1)
        return torch.where(fresh, self.get_parameter(f"meta_{name}").to(state[name].dtype), state[name])

    def _projected(self, u: Float[Tensor, "B T D"], positions: Int[Tensor, "B T"]) -> tuple[Tensor, ...]:
        q, k, v, x, z = self.in_proj(u).split(self.widths, -1)
        q, k = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k))
        if self.config.rope_base:
            q, k = (rope(t, positions, self.config.rope_base) for t in (q, k))
        return q, k, v.unflatten(-1, (self.n_kv_heads, -1)), x, z

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, state: State, lengths: Tensor | None):
        """Meta tokens stand at the first positions, the text behind them."""
        recent = {n: torch.cat([state[n], zero_padding(t, lengths)], 1) for n, t in (("k", k), ("v", v))}
        rows, past, reach = (len(q), -1, -1, -1), state.length + self.config.n_meta, self.config.window - 1
        keys, values = (torch.cat([self.get_parameter(f"meta_{n}").expand(rows), t], 1) for n, t in recent.items())
        o = sparse_attention(q, keys, values, self._seen(), past, past - reach, self.config.n_meta)
        return o, {n: last_tokens(t, reach, lengths) for n, t in recent.items()}

    def _seen(self) -> IndexSet:
        return Window(self.config.window) | Global(self.config.n_meta)

    def _average(self, a: Float[Tensor, "B T H V"], m: Float[Tensor, "B T I"]) -> Float[Tensor, "B T D"]:
        return self.out_proj((self.pre_avg_layernorm1(a.flatten(2)) + self.pre_avg_layernorm2(m)) / 2)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v, u, z = self._projected(x, torch.arange(x.shape[1]).expand(len(x), -1))
        meta = {
            n: self.get_parameter(f"meta_{n}").expand(len(x), *[-1] * (3 if n in "kv" else 2)) for n in self.slots()
        }
        repeat, outs = self.n_heads // self.n_kv_heads, []
        for t in range(x.shape[1]):
            near = slice(max(0, t - self.config.window + 1), t + 1)
            keys, values = (
                torch.cat([meta[n], line[:, near]], 1).repeat_interleave(repeat, 2) for n, line in (("k", k), ("v", v))
            )
            weights = (torch.einsum("bhk,bshk->bhs", q[:, t], keys) / self.head_dim**0.5).softmax(-1)
            outs.append(torch.einsum("bhs,bshv->bhv", weights, values))
        u = self.conv1d.reference(torch.cat([meta["conv"], u], 1))[:, self.config.conv_size - 1 :]
        m, _ = selective_reference(u, *selected(self, u), meta["h"], D=self.D, gate=z)
        return self._average(torch.stack(outs, 1), m)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        scan = selective_scan_flops(B if mode == "step" else B * T, self.inner, self.config.d_state)
        tokens, before = (1, T) if mode == "step" else (T, 0)
        met = pairs(self._seen(), tokens, self.config.n_meta + before)
        return scan + 4.0 * B * self.n_heads * self.config.expand * self.head_dim * met
