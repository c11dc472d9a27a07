r"""cosFormer: linear attention with rectified queries and keys, whose weights fade with the distance like a cosine.

    S_t = S_{t-1} + phi(k_t) v_t^T        z_t = z_{t-1} + phi(k_t)        o_t = S_t^T phi(q_t) / (z_t . phi(q_t))

    phi(x_t) = [relu(x_t) cos(a_t), relu(x_t) sin(a_t)]        a_t = pi min(t, M) / (2 M)        y_t = W_o o_t

so that phi(q_t) . phi(k_s) = relu(q_t) . relu(k_s) cos(a_t - a_s). In the paper M is the length of the text; here it
is a setting, reach, since a stream has no known length. Tokens beyond it share the angle of the M-th: no weight is
negative at any length, but among those tokens nothing fades. The biases of the authors' projections are left out, and
1e-6 is added to the divisor where they take it as the least.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from slipstream.core.config import MixerConfig, heads
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.feature_lines import Features, feature_one, feature_prefill, feature_reference
from slipstream.layers.feature_maps import cosine_fading
from slipstream.layers.linear import Linear
from slipstream.layers.lines import add_lines, line_slots
from slipstream.ops.normalised_scan import normalised_flops


class CosFormer(Mixer, name="cosformer", family="linear"):
    paper = "Qin et al. 2022, arXiv:2202.08791"
    use_when = "the length of texts is known, near tokens matter more than far ones, and nothing must fade for good"
    writes, erases = "phi(k) v^T", "nothing"
    decays, reads = "nothing", "S^T phi(q) / (z . phi(q))"
    train_order, decode_order = "T", "1"
    symbols = {"phi": "cosine_fading", "M": "reach", "z": "the last column of S"}
    oracle = "the paper's weights in a T x T matrix in numpy, tests/oracles/feature_attention.npz"

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        reach: int = Field(2048, ge=1)  # positions over which weights fade, the paper's M; later ones share one angle
        conv_size: int = 0  # width of a short convolution on q, k and v; 0 for none, as in the paper
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_heads=2, reach=15, conv_size=3, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads = heads(config.d_model, config.n_heads)
        self.head_dim = config.d_model // self.n_heads
        add_lines(self, dict.fromkeys("qkv", config.d_model), config.conv_size)
        self.o_proj = Linear(config.d_model, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        return {"S": Slot((self.n_heads, 2 * self.head_dim, self.head_dim + 1)), **line_slots(self)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        features = self._features(state.length, x.shape[1])
        o, state = feature_prefill(self, self.n_heads, self.config.chunk_size, features, x, state, lengths)
        return self.o_proj(o), state

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        o, state = feature_one(self, self.n_heads, self._features(state.length, 1), x, state)
        return self.o_proj(o), state

    def _features(self, past: Int[Tensor, "B"], tokens: int) -> Features:
        """Of the tokens after so many; positions count from 1."""
        positions = past[:, None] + 1 + torch.arange(tokens, device=past.device)
        return lambda q, k: (
            cosine_fading(q, positions, self.config.reach),
            cosine_fading(k, positions, self.config.reach),
        )

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        features = self._features(torch.zeros(x.shape[0], dtype=torch.long), x.shape[1])
        return self.o_proj(feature_reference(self, self.n_heads, features, x))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        K = self.head_dim
        return normalised_flops(T, B, self.n_heads, 2 * K, K, mode, chunk_size=self.config.chunk_size)
