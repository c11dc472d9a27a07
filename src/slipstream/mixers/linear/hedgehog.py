r"""Hedgehog: linear attention with learned features that are as spiky as softmax.

    S_t = S_{t-1} + phi(k_t) v_t^T        z_t = z_{t-1} + phi(k_t)        o_t = S_t^T phi(q_t) / (z_t . phi(q_t))

    phi(x) = [softmax(W_h x), softmax(-W_h x)]        y_t = W_o o_t

W_h is a matrix of each head, one for q and one for k, and starts as the identity. The two softmaxes are those of the
authors' LoLCATs, which names them Hedgehog's; fla takes one over both halves, of 2 W x. The paper first trains W to
mimic the weights of a softmax model; here it learns with the rest. The divisor has 1e-6 added.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.feature_lines import feature_one, feature_prefill, feature_reference
from slipstream.layers.feature_maps import learned_pair
from slipstream.layers.linear import Linear
from slipstream.layers.lines import add_lines, line_slots
from slipstream.ops.normalised_scan import normalised_flops


class Hedgehog(Mixer, name="hedgehog", family="linear"):
    paper = "Zhang, Bhatia, Kumbong, Re 2024, arXiv:2402.04347; softmax features: LoLCATs, arXiv:2410.10254"
    use_when = "a softmax model is to be turned into constant memory, or weights should be sharp without a larger state"
    writes, erases = "phi(k) v^T", "nothing"
    decays, reads = "nothing", "S^T phi(q) / (z . phi(q))"
    train_order, decode_order = "T", "1"
    symbols = {"phi": "learned_pair", "W_h": "feature_map_q, feature_map_k", "z": "the last column of S"}
    oracle = "the paper's weights in a T x T matrix in numpy, tests/oracles/feature_attention.npz"

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        conv_size: int = 0  # width of a short convolution on q, k and v; 0 for none, as in the paper
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_heads=2, conv_size=3, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads = heads(config.d_model, config.n_heads)
        self.head_dim = config.d_model // self.n_heads
        add_lines(self, dict.fromkeys("qkv", config.d_model), config.conv_size)
        identity = torch.eye(self.head_dim).repeat(self.n_heads, 1, 1)
        self.feature_map_q, self.feature_map_k = nn.Parameter(identity), nn.Parameter(identity.clone())
        self.o_proj = Linear(config.d_model, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        return {"S": Slot((self.n_heads, 2 * self.head_dim, self.head_dim + 1)), **line_slots(self)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        o, state = feature_prefill(self, self.n_heads, self.config.chunk_size, self._features, x, state, lengths)
        return self.o_proj(o), state

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        o, state = feature_one(self, self.n_heads, self._features, x, state)
        return self.o_proj(o), state

    def _features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return learned_pair(q, self.feature_map_q), learned_pair(k, self.feature_map_k)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.o_proj(feature_reference(self, self.n_heads, self._features, x))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        K, tokens = self.head_dim, B * (1 if mode == "step" else T)
        products = normalised_flops(T, B, self.n_heads, 2 * K, K, mode, chunk_size=self.config.chunk_size)
        return 4.0 * tokens * self.n_heads * K * K + products
