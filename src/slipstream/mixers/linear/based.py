r"""Based: linear attention whose weights are the second-order Taylor polynomial of the softmax kernel.

    S_t = S_{t-1} + phi(k_t) v_t^T        z_t = z_{t-1} + phi(k_t)        o_t = S_t^T phi(q_t) / (z_t . phi(q_t))

    phi(q) . phi(k) = 1 + s + s^2 / 2        s = q . k / sqrt(K)        y_t = W_o o_t

The linear half of the architecture alone: its layers take turns with exact attention over a short window, as in the
pattern "based, sliding_window(window=64)". Queries and keys are narrow (K = feature_dim), since features number
1 + K + K (K + 1) / 2; the authors keep both x_i x_j and x_j x_i, for the same weights. Weights are named as in fla.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from slipstream.core.config import MixerConfig, heads
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.feature_lines import feature_one, feature_prefill, feature_reference
from slipstream.layers.feature_maps import taylor_exp
from slipstream.layers.linear import Linear
from slipstream.layers.lines import add_lines, line_slots
from slipstream.ops.normalised_scan import normalised_flops


class Based(Mixer, name="based", family="linear"):
    paper = "Arora et al. 2024, arXiv:2402.18668"
    use_when = "recall is worth a larger state: as the far-sighted layers of a hybrid with short exact windows"
    writes, erases = "phi(k) v^T", "nothing"
    decays, reads = "nothing", "S^T phi(q) / (z . phi(q))"
    train_order, decode_order = "T", "1"
    symbols = {"phi": "taylor_exp", "d'": "feature_dim", "z": "the last column of S"}
    oracle = "naive_parallel_based of fla 0.6.0, tests/oracles/feature_attention.npz"

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
        self.n_features, self.head_dim = 1 + K + K * (K + 1) // 2, config.d_model // self.n_heads
        add_lines(self, {"q": self.n_heads * K, "k": self.n_heads * K, "v": config.d_model}, config.conv_size)
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
        return taylor_exp(q * scale), taylor_exp(k * scale)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.o_proj(feature_reference(self, self.n_heads, self._features, x))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        K, V = self.n_features, self.head_dim
        return normalised_flops(T, B, self.n_heads, K, V, mode, chunk_size=self.config.chunk_size)
