r"""Linformer: softmax attention over a few learned mixtures of all tokens; bidirectional, so for encoders only.

    o_t = softmax(q_t (E K)^T / sqrt(K)) (F V)        y_t = W_o o_t

E and F (r x max_len) mix the keys and the values of all tokens into r rows, the same for all heads. Inputs may be shorter
than max_len, which leaves out the last columns, but not longer. Every mixture holds tokens of the future: there is no
causal form, no prefill and no step, and a language model refuses it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.bidirectional import Bidirectional
from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mode
from slipstream.layers.linear import Linear
from slipstream.ops.valid import zero_padding

WHY = "its keys and values are mixtures of all tokens, those to come included"


class Linformer(Bidirectional, name="linformer", family="linear"):
    paper = "Wang, Li, Khabsa, Fang, Ma 2020, arXiv:2006.04768, eq. 7; E and F shared by the heads"
    use_when = "encoders of inputs up to a known length are too slow with full attention, and need no causal order"
    train_order, decode_order = "T", "T"
    symbols = {"E": "k_mix transposed", "F": "v_mix transposed", "k": "rank", "n": "max_len"}
    oracle = "LinformerSelfAttention of the package linformer 0.2.3, tests/oracles/slot_attention.npz"
    limits = {"prefill": WHY, "step": WHY}

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        max_len: int = 1024  # columns of E and F: no input may be longer
        rank: int = 128  # mixtures of tokens that are attended to

    config: Config
    tiny = Config(d_model=16, n_heads=2, max_len=70, rank=5)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads = heads(config.d_model, config.n_heads)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            Linear(config.d_model, config.d_model, bias=False) for _ in range(4)
        )
        bound = config.rank**-0.5
        self.k_mix, self.v_mix = (
            nn.Parameter(torch.empty(config.max_len, config.rank).uniform_(-bound, bound)) for _ in range(2)
        )

    def whole(self, x: Float[Tensor, "B T D"], lengths: Int[Tensor, "B"] | None = None) -> Float[Tensor, "B T D"]:
        T = x.shape[1]
        if self.config.max_len < T:
            raise InputError(f"linformer mixes up to {self.config.max_len} tokens, not {T}; set max_len={T}")
        q = self._by_head(self.q_proj(x))
        k, v = (zero_padding(proj(x), lengths) for proj in (self.k_proj, self.v_proj))
        k, v = (self._by_head(mix[:T].T @ line) for mix, line in ((self.k_mix, k), (self.v_mix, v)))
        weights = torch.einsum("bthk,brhk->bhtr", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
        return self.o_proj(torch.einsum("bhtr,brhv->bthv", weights, v).flatten(2))

    def _by_head(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H K"]:
        return x.unflatten(-1, (self.n_heads, -1))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = (self._by_head(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        k_mixed = sum(torch.einsum("r,bhk->brhk", self.k_mix[s], k[:, s]) for s in range(x.shape[1]))
        v_mixed = sum(torch.einsum("r,bhk->brhk", self.v_mix[s], v[:, s]) for s in range(x.shape[1]))
        outs = []
        for t in range(x.shape[1]):
            weights = (torch.einsum("bhk,brhk->bhr", q[:, t], k_mixed) / q.shape[-1] ** 0.5).softmax(-1)
            outs.append(torch.einsum("bhr,brhv->bhv", weights, v_mixed))
        return self.o_proj(torch.stack(outs, 1).flatten(2))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return 8.0 * B * T * self.config.rank * self.config.d_model
