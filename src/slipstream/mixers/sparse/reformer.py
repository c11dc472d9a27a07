r"""Reformer (LSH attention): a token meets earlier tokens of about its own direction, found by hashing; queries are keys.

    q_t = W_qk x_t        k_s = q_s / |q_s|        b_r(t) = argmax [q_t R_r; -q_t R_r]

    G_r(t) = the last W of {s <= t : b_r(s) = b_r(t)}        o_t = sum_{s in union of G_r(t), s != t} softmax_s(q_t . k_s) v_s

A token meets itself only where it meets nobody else. Rounds r are combined by the logarithms of their denominators, and a
pair that several bring together counts once, as in the paper. What differs from it: there, tokens sorted by bucket are cut
into chunks of m, and each meets its own and the previous chunk (other buckets too, unless they are masked). Where the
cuts fall depends on later tokens, so that no cache can step exactly (theirs does not). Here a token meets the last W of its
bucket, whatever comes later: where the previous chunk reaches all of the bucket both are the same, and W = 2m sees all that
chunks of m see of a bucket. So every mode is exact, and memory is constant: W tokens a bucket and round.

Logits are not divided by sqrt(K), as in the authors' code. Positions are rotary, turned after hashing; the paper adds
positions to the embeddings, and its reversible layers are a matter of the block. Rotations R are drawn once from the seed.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.buckets import chosen_heads, ring_slots, rings_of
from slipstream.layers.linear import Linear
from slipstream.layers.rope import rope
from slipstream.ops.bucket_attention import bucket_attention, bucket_flops, bucket_prefill, bucket_step
from slipstream.ops.bucket_attention import reference as bucket_reference
from slipstream.ops.l2_norm import l2_norm


class Reformer(Mixer, name="reformer", family="sparse"):
    paper = "Kitaev et al. 2020, arXiv:2001.04451, sec. 2"
    use_when = "what belongs together is alike, and is to be found at any distance without memory that grows"
    writes, erases = "k and v, in its bucket of every round", "nothing"
    decays, reads = "the oldest of a bucket's W, all at once", "softmax(K q)^T V over the bucket"
    train_order, decode_order = "T", "1"
    symbols = {"R": "rotations", "b": "n_buckets", "h": "bucket", "N_rounds": "n_hashes", "qk": "qk_proj"}
    oracle = "LSHAttention of reformer-pytorch 1.4.4 and transformers' LSHSelfAttention, tests/oracles"

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        n_hashes: int = Field(2, ge=1)  # rounds of hashing: more find more of what is alike
        n_buckets: int = Field(16, ge=2)  # buckets of a round; even
        window: int = Field(64, ge=1)  # tokens of a bucket that are seen, the latest, the current one included
        rope_base: float | None = 10000.0  # base of the rotary positions; None for no positions (NoPE)
        seed: int = 0  # of the rotations

    config: Config
    rotations: Tensor
    tiny = Config(d_model=16, n_heads=2, n_hashes=2, n_buckets=4, window=5)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.n_buckets % 2:
            raise InputError(
                f"n_buckets {config.n_buckets} must be even: a direction and its opposite; try {config.n_buckets + 1}"
            )
        self.n_heads, D = heads(config.d_model, config.n_heads), config.d_model
        self.head_dim = D // self.n_heads
        self.qk_proj, self.v_proj, self.o_proj = (Linear(D, D, bias=False) for _ in range(3))
        draw = torch.Generator().manual_seed(config.seed)
        dims = (self.n_heads, self.head_dim, config.n_hashes, config.n_buckets // 2)
        self.register_buffer("rotations", torch.randn(dims, generator=draw))

    def slots(self) -> dict[str, Slot]:
        return ring_slots(self.n_heads, self.config.n_hashes, self.config.n_buckets, self.config.window, self.head_dim)

    def _from_fresh(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Training needs no rings."""
        start = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        o = bucket_attention(*self._hashed(x, start), self.config.window, lengths, scale=1.0, own=False)
        return self.o_proj(o.flatten(2))

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        hashed, rings = self._hashed(x, state.length), rings_of(state)
        o, rings = bucket_prefill(*hashed, self.config.window, rings, lengths, scale=1.0, own=False)
        return self.o_proj(o.flatten(2)), state.advance(x.shape[1] if lengths is None else lengths, **rings._asdict())

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        hashed, rings = self._hashed(x, state.length), rings_of(state)
        o, rings = bucket_step(*hashed, self.config.window, rings, scale=1.0, own=False)
        return self.o_proj(o.flatten(2)), state.advance(1, **rings._asdict())

    def _hashed(self, x: Float[Tensor, "B T D"], start: Int[Tensor, "B"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and v by heads, and buckets (B T H R)."""
        qk = chosen_heads(self.qk_proj, x, self.n_heads)
        turned = torch.einsum("bthk,hkrc->bthrc", qk.detach(), self.rotations.to(qk.dtype))
        bucket = torch.cat([turned, -turned], -1).argmax(-1)  # of equals the first
        if self.config.rope_base:
            qk = rope(qk, start[:, None] + torch.arange(x.shape[1], device=x.device), self.config.rope_base)
        v = self.v_proj(x).unflatten(-1, (self.n_heads, -1))
        return qk.to(x.dtype), l2_norm(qk).to(x.dtype), v, bucket

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v, bucket = self._hashed(x, torch.zeros(len(x), dtype=torch.long))
        return self.o_proj(bucket_reference(q, k, v, bucket, self.config.window, scale=1.0, own=False).flatten(2))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        tokens, c = B * (1 if mode == "step" else T), self.config
        hashing = tokens * self.n_heads * self.head_dim * c.n_hashes * c.n_buckets
        return hashing + bucket_flops(T, B, self.n_heads, self.head_dim, self.head_dim, c.n_hashes, c.window, mode)
