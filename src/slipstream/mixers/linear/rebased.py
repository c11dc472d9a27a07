r"""ReBased: linear attention whose weights are squares of products of normalised queries and keys.

    S_t = S_{t-1} + phi(k_t) v_t^T        z_t = z_{t-1} + phi(k_t)        o_t = S_t^T phi(q_t) / (z_t . phi(q_t))

    phi(q) . phi(k) = (q . k)^2 / K        q, k = gamma * norm(W x) + beta        y_t = W_o o_t

Unlike those of Based, weights can be zero, so that a query can leave a token out altogether. norm is a layer norm over
all heads together, one for q and one for k, as in the authors' code; fla has one over each head, shared by q and k.
The divisor has 1e-6 added.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.feature_lines import feature_one, feature_prefill, feature_reference
from slipstream.layers.feature_maps import pairs
from slipstream.layers.linear import Linear
from slipstream.layers.lines import add_lines, line_slots
from slipstream.ops.normalised_scan import normalised_flops


class ReBased(Mixer, name="rebased", family="linear"):
    paper = "Aksenov et al. 2024, arXiv:2402.10644; the norm over all heads: authors' code"
    use_when = "recall in constant memory is wanted with sharper weights than those of Based, at the same state"
    writes, erases = "phi(k) v^T", "nothing"
    decays, reads = "nothing", "S^T phi(q) / (z . phi(q))"
    train_order, decode_order = "T", "1"
    symbols = {"phi": "pairs", "gamma": "ln_q.weight, ln_k.weight", "beta": "ln_q.bias, ln_k.bias"}
    oracle = "naive_parallel_rebased of fla 0.6.0, tests/oracles/feature_attention.npz"

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        feature_dim: int = Field(16, ge=1)  # width of a query or key; the state grows with its square
        conv_size: int = 0  # width of a short convolution on q, k and v; 0 for none, as in the paper
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_heads=2, feature_dim=3, conv_size=3, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads, K = heads(config.d_model, config.n_heads), config.feature_dim
        self.n_features, self.head_dim = K * (K + 1) // 2, config.d_model // self.n_heads
        add_lines(self, {"q": self.n_heads * K, "k": self.n_heads * K, "v": config.d_model}, config.conv_size)
        self.ln_q, self.ln_k = nn.LayerNorm(self.n_heads * K), nn.LayerNorm(self.n_heads * K)
        self.o_proj = Linear(config.d_model, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        return {"S": Slot((self.n_heads, self.n_features, self.head_dim + 1)), **line_slots(self)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        o, state = feature_prefill(self, self.n_heads, self.config.chunk_size, self._features, x, state, lengths)
        return self.o_proj(o), state

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        o, state = feature_one(self, self.n_heads, self._features, x, state)
        return self.o_proj(o), state

    def _features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.config.feature_dim**-0.25
        return pairs(_normal(q, self.ln_q) * scale), pairs(_normal(k, self.ln_k) * scale)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.o_proj(feature_reference(self, self.n_heads, self._features, x))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        K, V = self.n_features, self.head_dim
        return normalised_flops(T, B, self.n_heads, K, V, mode, chunk_size=self.config.chunk_size)


def _normal(x: Float[Tensor, "B T H K"], norm: nn.LayerNorm) -> Float[Tensor, "B T H K"]:
    """Over all heads together, in x's precision, whatever that of the weights."""
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    return F.layer_norm(x.flatten(2), norm.normalized_shape, weight, bias, norm.eps).unflatten(2, x.shape[2:])
