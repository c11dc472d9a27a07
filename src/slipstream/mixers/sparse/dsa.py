r"""DeepSeek sparse attention (DSA): a light indexer picks top_k tokens for each, and latent attention reads these alone.

    o_t^h = W_v^h sum_{s in C(t)} softmax_s((W_k^hT q_t^h . c_s + rope(u_t^h) . r_s) / sqrt(n + r)) c_s        C(t) = top_k of I_t

    I_ts = sum_i w_t^i relu(a_t^i . b_s)        a_t = rope(W_a z_t)  b_t = rope(norm(W_b x_t))  w_t = W_w x_t      s <= t

    L = mean_t KL(sum_h P_ts^h / H || softmax_s(I_ts / sqrt(d)))        P: attention to all s <= t; d: width of all a_t^i

c, r, q, u are MLA's (absorbed: all heads read the same latents); z is x, or norm(W_qa x) with q_rank. What is chosen has no
gradient: the indexer learns by L alone, the model by its text alone; who trains opens core/auxiliary.py. L is that of the
paper's warm-up, over all tokens, which an indexer that begins at random needs; in its long second stage both are taken over C(t).
L costs as much as full attention, in training only. Up to top_k tokens nothing is left out. Indexing still costs T^2, in few
and narrow heads. DeepSeek's FP8 and Hadamard turn are left out.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from slipstream.core.auxiliary import teach
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.latent_kv import LatentConfig, LatentKV, one_latent
from slipstream.layers.linear import Linear
from slipstream.layers.rope import rope
from slipstream.ops.attention import write_cache
from slipstream.ops.choice_loss import choice_loss, weights
from slipstream.ops.chosen_attention import (
    chosen_tokens,
    gathered_flops,
    index_scores,
    indexed_flops,
    indexed_tokens,
    tokens_flops,
)
from slipstream.ops.softmax import Softmax, read
from slipstream.ops.valid import real_tokens, zero_padding


class Indexer(nn.Module):
    """What tokens are ranked by. Weights are named as in DeepSeek's checkpoints; positions turn half-split pairs there too."""

    def __init__(self, d_model: int, width: int, n_heads: int, head_dim: int, latent: LatentKV) -> None:
        super().__init__()
        self.n_heads, self.rope_base, self.turned = n_heads, latent.rope_base, min(latent.rope, head_dim // 2 * 2)
        self.scaling = latent.scaling  # of angles alone: what is ranked by is no longer for it
        self.wq_b = Linear(width, n_heads * head_dim, bias=False)
        self.wk = Linear(d_model, head_dim, bias=False)
        self.k_norm = nn.LayerNorm(head_dim, eps=1e-6)
        self.weights_proj = Linear(d_model, n_heads, bias=False)

    def forward(
        self, x: Float[Tensor, "B T D"], low: Float[Tensor, "B T Q"], positions: Int[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T I K"], Float[Tensor, "B T I"], Float[Tensor, "B T K"]]:
        """a, w and b."""
        a, b = self.wq_b(low).unflatten(-1, (self.n_heads, -1)), self.k_norm(self.wk(x))[:, :, None]
        return self._turn(a, positions), self.weights_proj(x), self._turn(b, positions)[:, :, 0]

    def _turn(self, t: Tensor, positions: Tensor) -> Tensor:
        if not self.rope_base:
            return t
        return torch.cat(
            [rope(t[..., : self.turned], positions, self.rope_base, self.scaling), t[..., self.turned :]], -1
        )


class DSA(Mixer, name="dsa", family="sparse"):
    paper = "DeepSeek-AI 2025 (DeepSeek-V3.2), arXiv:2512.02556; MLA: arXiv:2405.04434, sec. 2.1"
    use_when = "a trained latent attention must read long texts: few tokens for each, found one by one at any distance"
    writes, erases = "c, r and b, beside all others", "nothing"
    decays, reads = "nothing", "W_v sum softmax((W_k^T q) . c + u . r) c over top_k tokens"
    train_order, decode_order = "T^2", "T"
    symbols = {
        "k": "top_k",
        "H^I": "index_n_heads",
        "d^I": "index_head_dim",
        "c^KV": "c_kv",
        "k^R": "k_rope",
        "k^I": "k_index",
    }
    oracle = (
        "transformers DeepseekV32Attention, and naive_dsa of fla 0.6.0, tests/oracles/test_chosen_attention_oracles.py"
    )
    no_gradient = ("indexer",)

    class Config(LatentConfig):
        top_k: int = Field(256, ge=1)  # tokens that are read (DeepSeek-V3.2: 2048)
        index_n_heads: int = Field(4, ge=1)  # heads of the indexer (64)
        index_head_dim: int = Field(32, ge=2)  # width of one (128)
        index_loss: float = Field(1.0, ge=0)  # weight of L, which moves the indexer alone: as in DeepSeek-V3.2

    config: Config
    tiny = Config(
        d_model=16, n_heads=3, q_rank=7, kv_rank=5, nope_head_dim=4, rope_head_dim=2, v_head_dim=3,
        top_k=6, index_n_heads=2, index_head_dim=4, index_loss=1.0,
    )  # fmt: skip

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c, self.latent = config, one_latent(config)
        self.indexer = Indexer(c.d_model, c.q_rank or c.d_model, c.index_n_heads, c.index_head_dim, self.latent)
        self.softmax = Softmax(scale=self.latent.scale)

    def slots(self) -> dict[str, Slot]:
        widths = {
            "c_kv": (1, self.latent.kv_rank),
            "k_rope": (1, self.latent.rope),
            "k_index": (self.config.index_head_dim,),
        }
        return {n: Slot((0, *width), dtype=None, grows=True) for n, width in widths.items()}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        q, chosen, kept = self._choose(x, self.reserve(state, x.shape[1]), lengths)
        teach(self, self.config.index_loss, partial(self.lesson, x, q, kept, state.length, lengths))
        filled = int(state.length.max()) + x.shape[1] if len(x) else 0
        c, r = kept["c_kv"][:, :filled], kept["k_rope"][:, :filled]
        o = chosen_tokens(q, torch.cat([c, r], -1), c, chosen, self.softmax)
        return self._output(o), state.advance(x.shape[1] if lengths is None else lengths, **kept)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        """In a cache that has room already: init_state(B, max_len), or reserve."""
        q, chosen, kept = self._choose(x, state, None)
        token = chosen[:, 0, 0, :, None, None].clamp(min=0)
        c, r = (torch.take_along_dim(kept[n], token, 1) for n in ("c_kv", "k_rope"))
        o = read(q, torch.cat([c, r], -1), c, chosen.transpose(1, 2) >= 0, self.softmax)
        return self._output(o), state.advance(1, **kept)

    def _choose(self, x: Tensor, state: State, lengths: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Queries that meet latents, the tokens they read, and the new slots."""
        past = state.length
        positions = past[:, None] + torch.arange(x.shape[1], device=x.device)
        low = self.latent.low_rank(x)
        q, turned = self.latent.queries(low, positions)
        with torch.no_grad():
            a, w, b = self.indexer(x, low, positions)
        new = dict(zip(("c_kv", "k_rope"), self.latent.latents(x, positions))) | {"k_index": b}
        kept = {n: write_cache(state[n], t, past, lengths) for n, t in new.items()}
        chosen = indexed_tokens(a, w, kept["k_index"], past, self.config.top_k)
        return torch.cat([self.latent.absorb(q), turned], -1), chosen, kept

    def lesson(self, x: Tensor, q: Tensor, kept: dict[str, Tensor], past: Tensor, lengths: Tensor | None):
        """The sum of L over so many tokens; its gradient reaches the indexer and nothing else."""
        keys = torch.cat([kept["c_kv"], kept["k_rope"]], -1).detach()
        x, q = (zero_padding(t.detach(), lengths).to(keys.dtype) for t in (x, q))
        positions = past[:, None] + torch.arange(x.shape[1], device=x.device)
        with torch.no_grad():
            low = self.latent.low_rank(x)
        a, w, b = self.indexer(x, low, positions)
        b = write_cache(kept["k_index"], b, past, lengths)
        a_query = len(x) * keys.shape[1] * (self.latent.n_heads + self.indexer.n_heads)
        return choice_loss(self._tile, real_tokens(x, lengths), (positions, q, a, w), (keys, b), a_query)

    def _tile(self, positions: Tensor, q: Tensor, a: Tensor, w: Tensor, keys: Tensor, b: Tensor):
        n = int(positions.max()) + 1
        seen = (torch.arange(n, device=q.device) <= positions[..., None])[:, None]
        read_by_heads = weights(q, keys[:, :n], seen, self.softmax)
        scores = index_scores(a, w, b[:, :n]) * (a.shape[2] * a.shape[3]) ** -0.5
        return read_by_heads.sum(1, keepdim=True), scores[:, None], seen

    def _output(self, o: Float[Tensor, "B T H C"]) -> Float[Tensor, "B T D"]:
        return self.latent.o_proj(self.latent.values(o).flatten(2))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Expanded, and token by token."""
        positions = torch.arange(x.shape[1]).expand(x.shape[0], -1)
        low = self.latent.low_rank(x)
        q = torch.cat(self.latent.queries(low, positions), -1)
        k, v = self.latent.expand(*self.latent.latents(x, positions))
        with torch.no_grad():
            a, w, b = self.indexer(x, low, positions)
        outputs = []
        for t in range(x.shape[1]):
            scores = torch.einsum("bi,bis->bs", w[:, t], torch.einsum("bik,bsk->bis", a[:, t], b[:, : t + 1]).relu())
            best = scores.argsort(dim=1, descending=True, stable=True)[:, : self.config.top_k, None, None]
            keys, values = (torch.take_along_dim(line, best, 1) for line in (k, v))
            weights = (torch.einsum("bhk,bshk->bhs", q[:, t], keys) * self.latent.scale).softmax(-1)
            outputs.append(torch.einsum("bhs,bshv->bhv", weights, values))
        return self.latent.o_proj(torch.stack(outputs, 1).flatten(2))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        c, H, C, R = self.config, self.latent.n_heads, self.latent.kv_rank, self.latent.rope
        index = indexed_flops(T, B, c.index_n_heads, c.index_head_dim, mode)
        if mode == "step":
            return index + gathered_flops(B, H, C + R, C, c.top_k)
        return index + tokens_flops(T, B, H, C + R, C, c.top_k)
