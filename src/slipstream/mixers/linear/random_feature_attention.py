r"""Random feature attention with its gate (RFA-Gate): a softmax kernel by random sines and cosines, which fades.

    S_t = g_t S_{t-1} + (1 - g_t) phi(k_t) v_t^T        z_t = g_t z_{t-1} + (1 - g_t) phi(k_t)
    o_t = S_t^T phi(q_t) / (z_t . phi(q_t))             g_t = sigmoid(w_g x_t + b_g)

    phi(x) = [sin(w_r . x'), cos(w_r . x')] / sqrt(R)   x' = sigma_h * x / |x|       y_t = W_o o_t

Since q and k have unit length, phi(q) . phi(k) is near exp(q . k) up to a factor that the division removes; sigma,
learned per head and channel, sharpens it. Random features can make the divisor negative: it then counts as 0, and
1e-3 is added, where the authors take a least value. The rows w_r are orthogonal and drawn once from the seed; the
paper draws new ones for each batch in training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.feature_lines import Features, feature_one, feature_prefill, feature_reference
from slipstream.layers.feature_maps import fourier, orthogonal_gaussian_rows
from slipstream.layers.linear import Linear
from slipstream.layers.lines import add_lines, line_slots
from slipstream.ops.l2_norm import l2_norm
from slipstream.ops.normalised_scan import normalised_flops

EPS = 1e-3  # added to the divisor, whose error by chance is of the order of 1 / sqrt(R)


class RandomFeatureAttention(Mixer, name="random_feature_attention", family="linear"):
    paper = "Peng et al. 2021, arXiv:2103.02143; learned sigma: authors' code"
    use_when = "weights like those of softmax are wanted in constant memory, with a bias towards what is recent"
    writes, erases = "(1 - g) phi(k) v^T", "nothing"
    decays, reads = "a number a head, from x", "S^T phi(q) / (z . phi(q))"
    train_order, decode_order = "T", "1"
    symbols = {"phi": "fourier", "w_r": "projection_matrix", "D": "n_features", "g": "sigmoid(g_proj x)"}
    oracle = "the gated weights in a T x T matrix in numpy, tests/oracles/feature_attention.npz"
    no_weight_decay = ("sigma",)

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        n_features: int = Field(64, ge=1)  # random rows R of each head, each a sine and a cosine
        seed: int = 0  # of the random rows
        conv_size: int = 0  # width of a short convolution on q, k and v; 0 for none, as in the paper
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    projection_matrix: Tensor
    tiny = Config(d_model=16, n_heads=2, n_features=12, conv_size=3, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads = heads(config.d_model, config.n_heads)
        self.head_dim = config.d_model // self.n_heads
        add_lines(self, dict.fromkeys("qkv", config.d_model), config.conv_size)
        self.g_proj = Linear(config.d_model, self.n_heads)
        nn.init.zeros_(self.g_proj.weight)
        self.g_proj.bias.data = torch.linspace(5.0, 3.0, self.n_heads)  # memories of 150 to 20 tokens at the start
        self.sigma = nn.Parameter(torch.ones(self.n_heads, 1, self.head_dim))
        seeds = range(config.seed, config.seed + self.n_heads)
        rows = [orthogonal_gaussian_rows(config.n_features, self.head_dim, seed) for seed in seeds]
        self.register_buffer("projection_matrix", torch.stack(rows))
        self.o_proj = Linear(config.d_model, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        return {"S": Slot((self.n_heads, 2 * self.config.n_features, self.head_dim + 1)), **line_slots(self)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        features, log_decay = self._gated(x)
        chunk_size = self.config.chunk_size
        o, state = feature_prefill(self, self.n_heads, chunk_size, features, x, state, lengths, log_decay, EPS)
        return self.o_proj(o), state

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        features, log_decay = self._gated(x)
        o, state = feature_one(self, self.n_heads, features, x, state, log_decay, EPS)
        return self.o_proj(o), state

    def _gated(self, x: Tensor) -> tuple[Features, Float[Tensor, "B T H"]]:
        """How features of q and k are made, those of k times 1 - g; and log g."""
        logit = self.g_proj(x)
        logit = logit.to(torch.promote_types(logit.dtype, torch.float32))
        rows = self.sigma.to(logit.dtype) * self.projection_matrix.to(logit.dtype)
        written = (-logit).sigmoid()[..., None]
        return lambda q, k: (fourier(l2_norm(q), rows), written * fourier(l2_norm(k), rows)), F.logsigmoid(logit)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        features, log_decay = self._gated(x)
        return self.o_proj(feature_reference(self, self.n_heads, features, x, log_decay, EPS))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        K, R, tokens = self.head_dim, self.config.n_features, B * (1 if mode == "step" else T)
        products = normalised_flops(T, B, self.n_heads, 2 * R, K, mode, True, self.config.chunk_size)
        return 4.0 * tokens * self.n_heads * K * R + products
