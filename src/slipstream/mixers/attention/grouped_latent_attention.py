r"""Grouped latent attention (GLA): as MLA with several latents, each of which serves a group of heads.

    c_t^g = norm(W_a^g x_t)      r_t = rope(W_r x_t)      k_t^h = W_k^h c_t^g      v_t^h = W_v^h c_t^g      h in group g
    o_t^h = sum_{s<=t} softmax_s((q_t^h . k_s^h + rope(u_t^h) . r_s) / sqrt(n + r)) v_s^h

Memory is n_latents * kv_rank + rope_head_dim numbers a token: as much as MLA's with one latent as wide as all, but devices
that share the heads of a model need their own latents only, and a step's products are half as wide. Whole sequences and
prompts expand the latents, single steps read them as they lie. The authors' biases are left out, as DeepSeek does.
"""

from __future__ import annotations

from slipstream.core.config import heads
from slipstream.core.state import Slot
from slipstream.layers.latent_kv import LatentConfig, LatentKV, LatentMixer


class GroupedLatentAttention(LatentMixer, name="grouped_latent_attention", family="attention"):
    paper = "Zadouri, Strauss, Dao 2025, arXiv:2505.21487; layer as in Dao-AILab/grouped-latent-attention"
    use_when = (
        "facts must be found at any distance, and devices share the heads of a layer and keep their own latents only"
    )
    writes, erases = "c^1 .. c^L and r, beside all others", "nothing"
    decays, reads = "nothing", "W_v sum softmax((W_k^T q) . c^g + u . r) c^g"
    train_order, decode_order = "T^2", "T"
    symbols = {"h_c": "n_latents", "d_c": "kv_rank", "c^KV": "c_kv", "K^R": "k_rope", "d_R": "rope_head_dim"}
    oracle = "the authors' layer in numpy, tests/oracles/latent_attention.npz"

    class Config(LatentConfig):
        n_heads: int | None = None  # query heads; default d_model / 64, at least 4
        n_latents: int = 2  # latents, each for a group of heads
        kv_rank: int | None = None  # width of each latent; default 2 nope_head_dim

    config: Config
    tiny = Config(d_model=16, n_heads=4, n_latents=2, kv_rank=3, q_rank=7, nope_head_dim=4, rope_head_dim=2)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D, L, free = config.d_model, config.n_latents, config.nope_head_dim and config.n_heads
        n_heads = free or (heads(D, config.n_heads) if config.n_heads else L * heads(D // L, None, min(64, D // 4)))
        self.latent = LatentKV(config, n_heads, config.kv_rank or 2 * (config.nope_head_dim or D // n_heads), L)

    def slots(self) -> dict[str, Slot]:
        latents, key = (0, self.latent.n_latents, self.latent.kv_rank), (0, 1, self.latent.rope)
        return {"c_kv": Slot(latents, dtype=None, grows=True), "k_rope": Slot(key, dtype=None, grows=True)}
