r"""Linear Transformer: attention whose kernel is an inner product of positive features, so that the past is two sums.

    S_t = S_{t-1} + phi(k_t) v_t^T        z_t = z_{t-1} + phi(k_t)        o_t = S_t^T phi(q_t) / (z_t . phi(q_t))

    phi(x) = elu(x) + 1        y_t = W_o o_t

The normaliser z is kept as the last column of S, written by a value that is always 1. Nothing is ever forgotten.
The divisor has 1e-6 added, as in the authors' code. Weights are named as in fla (q_proj, k_proj, v_proj, o_proj).
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.config import MixerConfig, heads
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.feature_lines import feature_one, feature_prefill, feature_reference
from slipstream.layers.feature_maps import elu_plus_one
from slipstream.layers.linear import Linear
from slipstream.layers.lines import add_lines, line_slots
from slipstream.ops.normalised_scan import normalised_flops


class LinearTransformer(Mixer, name="linear_transformer", family="linear"):
    paper = "Katharopoulos, Vyas, Pappas, Fleuret 2020, arXiv:2006.16236, eq. 16-20"
    use_when = "a baseline for linear attention: the simplest constant memory, for short or repetitive sequences"
    writes, erases = "phi(k) v^T", "nothing"
    decays, reads = "nothing", "S^T phi(q) / (z . phi(q))"
    train_order, decode_order = "T", "1"
    symbols = {"s": "S without its last column", "z": "the last column of S", "phi": "elu_plus_one"}
    oracle = "eq. 9 with its T x T matrix in numpy, tests/oracles/linear_attention.npz"

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
        self.o_proj = Linear(config.d_model, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        return {"S": Slot((self.n_heads, self.head_dim, self.head_dim + 1)), **line_slots(self)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        o, state = feature_prefill(self, self.n_heads, self.config.chunk_size, self._features, x, state, lengths)
        return self.o_proj(o), state

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        o, state = feature_one(self, self.n_heads, self._features, x, state)
        return self.o_proj(o), state

    def _features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return elu_plus_one(q), elu_plus_one(k)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.o_proj(feature_reference(self, self.n_heads, self._features, x))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        K = self.head_dim
        return normalised_flops(T, B, self.n_heads, K, K, mode, chunk_size=self.config.chunk_size)
