r"""Multi-head latent attention (MLA): keys and values of all heads are made of one small latent a token.

    c_t = norm(W_a x_t)      r_t = rope(W_r x_t)      k_t^h = W_k^h c_t      v_t^h = W_v^h c_t
    o_t^h = sum_{s<=t} softmax_s((q_t^h . k_s^h + rope(u_t^h) . r_s) / sqrt(n + r)) v_s^h

Memory is c_t and r_t, kv_rank + rope_head_dim numbers a token whatever the number of heads. Whole sequences and prompts make
keys and values anew of all latents; a single step never does: it moves W_k to the query and W_v behind the sum (absorption).
A prefill of a few tokens over a long cache does more work than as many steps, since it expands the cache.
"""

from __future__ import annotations

from slipstream.core.state import Slot
from slipstream.layers.latent_kv import LatentConfig, LatentMixer, one_latent


class MLA(LatentMixer, name="mla", family="attention"):
    paper = "DeepSeek-AI 2024, arXiv:2405.04434, sec. 2.1; as in DeepSeek-V3, arXiv:2412.19437, sec. 2.1.1"
    use_when = "facts must be found again at any distance, and the cache of many heads is more than memory holds"
    writes, erases = "c and r, beside all others", "nothing"
    decays, reads = "nothing", "W_v sum softmax((W_k^T q) . c + u . r) c"
    train_order, decode_order = "T^2", "T"
    symbols = {
        "c^KV": "c_kv",
        "k^R": "k_rope",
        "d_c": "kv_rank",
        "d_c'": "q_rank",
        "d_h": "nope_head_dim",
        "d_h^R": "rope_head_dim",
    }
    oracle = "transformers DeepseekV2Attention and DeepseekV3Attention, tests/oracles/test_latent_attention_oracles.py"

    class Config(LatentConfig):
        kv_rank: int | None = None  # width of the latent; default 4 nope_head_dim, at most d_model / 2

    tiny = Config(d_model=16, n_heads=3, q_rank=7, kv_rank=5, nope_head_dim=4, rope_head_dim=2, v_head_dim=3)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.latent = one_latent(config)

    def slots(self) -> dict[str, Slot]:
        widths = {"c_kv": self.latent.kv_rank, "k_rope": self.latent.rope}
        return {n: Slot((0, 1, width), dtype=None, grows=True) for n, width in widths.items()}
