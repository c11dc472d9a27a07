r"""Native sparse attention (NSA): summaries of the whole past, the blocks they point at word for word, and a window.

    o_t = sum_{c in cmp, slc, win} g^c_t * sum_{s in G^c(t)} softmax_s(q_t . k^c_s / sqrt(K)) v^c_s
    g_t = sigmoid(W_g x_t + b)

    cmp:  of every stretch of l tokens, d tokens after the one before, seen once its last token is there,
          k_i = phi(k_{i d} + e_0, ..., k_{i d + l - 1} + e_{l-1})        phi(k) = W_2 silu(W_1 [k_0, ..., k_{l-1}])
    slc:  the top_k blocks where the weights of cmp, summed over a group's heads, are largest; the first block,
          the token's own and the one before always among them
    win:  t - window < s <= t

Each branch has keys and values of its own, and cmp a phi for each of both. slc and win have rotary positions; cmp has none
but e inside a stretch: the paper leaves it open. Which blocks are read is no function with a gradient: the ranking learns
by what cmp reads. All heads of a key head read the same blocks. Ranking costs T^2 / d small products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.rope import rope
from slipstream.ops.attention import attention_flops, window_attention, write_cache
from slipstream.ops.attention import reference as softmax_reference
from slipstream.ops.chosen_attention import blocks_flops, chosen_blocks, gathered_flops, gathered_tokens, tokens_of
from slipstream.ops.chosen_attention import reference as chosen_reference
from slipstream.ops.compressed_attention import Stretch, rank, stretches, summaries_attention, summaries_flops
from slipstream.ops.compressed_attention import reference as summaries_reference
from slipstream.ops.valid import last_tokens, zero_padding


class Compression(nn.Module):
    """phi: (... l G K) -> (... G K), the same for all heads."""

    def __init__(self, length: int, n_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.position = nn.Parameter(0.02 * torch.randn(length, n_kv_heads, head_dim))
        self.up = Linear(length * head_dim, head_dim, bias=False)
        self.down = Linear(head_dim, head_dim, bias=False)

    def forward(self, x: Float[Tensor, "*B l G K"]) -> Float[Tensor, "*B G K"]:
        return self.down(F.silu(self.up((x + self.position).transpose(-3, -2).flatten(-2))))


class NSA(Mixer, name="nsa", family="sparse"):
    paper = "Yuan et al. 2025, arXiv:2502.11089, eq. 5 to 12"
    use_when = (
        "long texts with few heads of keys: a summary of everything, and the few places that matter word for word"
    )
    writes, erases = "k and v of slc and win, beside all others; phi(k), phi(v) every d tokens", "nothing"
    decays, reads = "what leaves the window, all at once, in one branch of three", "sum_c g^c softmax(K^c q)^T V^c"
    train_order, decode_order = "T^2", "T"
    symbols = {"l": "compress_size", "d": "compress_stride", "l'": "block_size", "n": "top_k", "w": "window"}
    oracle = "naive_nsa_compression, _topk and _selection of fla 0.6.0 between numpy's parts, chosen_attention.npz"

    class Config(MixerConfig):
        n_heads: int | None = None  # query heads; default d_model / 64
        n_kv_heads: int | None = None  # key and value heads, whose query heads read the same blocks; default n_heads
        compress_size: int = Field(16, ge=1)  # tokens of one summary (the paper: 32)
        compress_stride: int = Field(8, ge=1)  # tokens from one summary to the next (16)
        block_size: int = Field(32, ge=1)  # tokens that are chosen together (64)
        top_k: int = Field(8, ge=3)  # blocks read, the first and the last two included (16)
        window: int = Field(128, ge=1)  # tokens seen in any case, the current one included (512)
        rope_base: float | None = 10000.0  # base of the rotary positions of slc and win; None for no positions

    config: Config
    tiny = Config(
        d_model=16, n_heads=4, n_kv_heads=2, compress_size=4, compress_stride=2, block_size=4, top_k=4, window=5
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c, D = config, config.d_model
        self.n_heads = heads(D, c.n_heads)
        self.n_kv_heads, self.head_dim = c.n_kv_heads or self.n_heads, D // self.n_heads
        if self.n_heads % self.n_kv_heads:
            raise InputError(f"n_heads {self.n_heads} does not divide into n_kv_heads {self.n_kv_heads} groups")
        if c.compress_size % c.compress_stride or c.block_size % c.compress_stride:
            raise InputError(
                f"compress_size {c.compress_size} and block_size {c.block_size} must be multiples of "
                f"compress_stride {c.compress_stride}"
            )
        width = 3 * self.n_kv_heads * self.head_dim
        self.q_proj, self.o_proj = (Linear(D, D, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (Linear(D, width, bias=False) for _ in range(2))  # cmp, slc, win
        self.g_proj = Linear(D, 3 * self.n_heads)
        nn.init.zeros_(self.g_proj.bias)
        self.stretch = Stretch(c.compress_size, c.compress_stride)
        self.k_compress, self.v_compress = (Compression(c.compress_size, self.n_kv_heads, self.head_dim) for _ in "kv")

    def slots(self) -> dict[str, Slot]:
        c, each = self.config, (self.n_kv_heads, self.head_dim)
        cache = Slot((0, *each), dtype=None, grows=True)
        summaries = Slot((0, *each), dtype=None, grows=True, every=c.compress_stride)
        unsummed, window = Slot((c.compress_size - 1, *each), dtype=None), Slot((c.window - 1, *each), dtype=None)
        kinds = {"cmp": unsummed, "sum": summaries, "slc": cache, "win": window}
        return {f"{n}_{kind}": slot for kind, slot in kinds.items() for n in "kv"}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        return self._read(x, self.reserve(state, x.shape[1]), lengths, self._read_blocks)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        """In a cache that has room already: init_state(B, max_len), or reserve."""
        return self._read(x, state, None, self._read_tokens)

    def _read_blocks(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, past: Tensor) -> Tensor:
        return chosen_blocks(q, k, v, chosen, past, self.config.block_size)

    def _read_tokens(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, past: Tensor) -> Tensor:
        return gathered_tokens(q, k, v, tokens_of(chosen, self.config.block_size, past[:, None]))

    def _read(self, x: Tensor, state: State, lengths: Tensor | None, read_chosen):
        past, c, stretch = state.length, self.config, self.stretch
        positions = past[:, None] + torch.arange(x.shape[1], device=x.device)
        plain, turned, branches = self._lines(x, positions)
        slots, line = {}, {}
        for name, compress, (cmp, slc, win) in zip("kv", (self.k_compress, self.v_compress), branches):
            line[name] = torch.cat([state[f"{name}_win"], zero_padding(win, lengths)], 1)
            waiting = torch.cat([state[f"{name}_cmp"], zero_padding(cmp, lengths)], 1)
            held, first, count = stretches(waiting, past, stretch, lengths)
            slots[f"{name}_sum"] = write_cache(state[f"{name}_sum"], compress(held), first, count)
            slots[f"{name}_slc"] = write_cache(state[f"{name}_slc"], slc, past, lengths)
            slots[f"{name}_cmp"] = last_tokens(waiting, c.compress_size - 1, lengths)
            slots[f"{name}_win"] = last_tokens(line[name], c.window - 1, lengths)
        o_cmp, _ = summaries_attention(plain, slots["k_sum"], slots["v_sum"], past, stretch)
        chosen = rank(plain, slots["k_sum"], past, stretch, c.block_size, c.top_k)
        o_slc = read_chosen(turned, slots["k_slc"], slots["v_slc"], chosen, past)
        o_win = window_attention(turned, line["k"], line["v"], past, c.window)
        y = self._output(x, o_cmp, o_slc, o_win)
        return y, state.advance(x.shape[1] if lengths is None else lengths, **slots)

    def _lines(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, tuple[list[Tensor], list[Tensor]]]:
        """q without and with positions; k and v, each of cmp, slc and win."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        ks, vs = (list(t.chunk(3, 2)) for t in (k, v))
        if not self.config.rope_base:
            return q, q, (ks, vs)
        turned, *ks[1:] = (rope(t, positions, self.config.rope_base) for t in (q, *ks[1:]))
        return q, turned, (ks, vs)

    def _output(self, x: Tensor, *branches: Float[Tensor, "B T H K"]) -> Float[Tensor, "B T D"]:
        gates = self.g_proj(x).sigmoid().unflatten(-1, (3, -1, 1)).unbind(2)
        return self.o_proj(sum(g * o for g, o in zip(gates, branches)).flatten(2))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        c, (l, d), G = self.config, self.stretch, self.n_kv_heads
        q, turned, (ks, vs) = self._lines(x, torch.arange(x.shape[1]).expand(len(x), -1))
        begins = range(0, self.stretch.whole(x.shape[1]) * d, d)
        fs = zip((self.k_compress, self.v_compress), (ks[0], vs[0]))
        k, v = (torch.stack([f(t[:, i : i + l]) for i in begins], 1) for f, t in fs)
        o_cmp, p = summaries_reference(q, k, v, self.stretch)
        score = p.unflatten(2, (G, -1)).sum(3)
        blocks = -(-x.shape[1] // c.block_size)
        shared = torch.zeros(len(begins), blocks, dtype=x.dtype)
        for i, begin in enumerate(begins):
            for stride in range(begin, begin + l, d):
                shared[i, stride // c.block_size] += 1
        scores = score @ shared  # B T G blocks
        chosen = torch.full((*scores.shape[:3], c.top_k), -1)
        for t in range(x.shape[1]):
            own = t // c.block_size
            always = sorted({0, max(0, own - 1), own})
            others = scores[:, t, :, 1 : max(1, own - 1)].argsort(dim=-1, descending=True, stable=True) + 1
            both = torch.cat([torch.tensor(always).expand(*others.shape[:2], -1), others], -1)[..., : c.top_k]
            chosen[:, t, :, : both.shape[-1]] = both
        o_slc = chosen_reference(turned, ks[1], vs[1], chosen, c.block_size)
        return self._output(x, o_cmp, o_slc, softmax_reference(turned, ks[2], vs[2], window=c.window))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        c, shape = self.config, (B, self.n_heads, self.head_dim)
        summaries = summaries_flops(T, *shape, self.head_dim, self.stretch, mode)
        ranking = summaries_flops(T, *shape, 0, self.stretch, mode)
        window = attention_flops(T, *shape, mode, c.window)
        if mode == "step":
            chosen = gathered_flops(*shape, self.head_dim, c.top_k * c.block_size)
            spared = B * (1 - self.n_kv_heads)
        else:
            chosen = blocks_flops(T, *shape, self.head_dim, self.n_kv_heads, c.top_k, c.block_size)
            spared = B * (T - -(-T // c.compress_stride) * self.n_kv_heads)
        compress = sum(m.weight.numel() for f in (self.k_compress, self.v_compress) for m in (f.up, f.down))
        return summaries + ranking + window + chosen - 2.0 * spared * compress
