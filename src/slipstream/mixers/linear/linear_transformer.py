r"""Linear Transformer: attention whose kernel is an inner product of positive features, so that the past is two sums.

    S_t = S_{t-1} + phi(k_t) v_t^T        z_t = z_{t-1} + phi(k_t)        o_t = S_t^T phi(q_t) / (z_t . phi(q_t))

    phi(x) = elu(x) + 1        y_t = W_o o_t

The normaliser z is kept as the last column of S, written by a value that is always 1. Nothing is ever forgotten.
Weights are named as in fla (q_proj, k_proj, v_proj, o_proj).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.feature_maps import elu_plus_one
from slipstream.layers.lines import add_lines, line_slots, lines_reference, run_lines
from slipstream.ops.outer_scan import outer_flops, outer_scan, outer_step

EPS = 1e-6  # added to the normaliser, as in the authors' code


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
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        return {"S": Slot((self.n_heads, self.head_dim, self.head_dim + 1)), **line_slots(self)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        lines, convs = run_lines(self, "qkv", x, state, lengths)
        q, k, v = self._by_heads(lines)
        v1 = F.pad(v, (0, 1), value=1.0)
        o, S = outer_scan(q, k, v1, None, state["S"], lengths, chunk_size=self.config.chunk_size)
        return self._output(o, x), state.advance(x.shape[1] if lengths is None else lengths, S=S, **convs)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        lines, convs = run_lines(self, "qkv", x, state, None)
        q, k, v = self._by_heads(lines)
        o, S = outer_step(q, k, F.pad(v, (0, 1), value=1.0), None, state["S"])
        return self._output(o, x), state.advance(1, S=S, **convs)

    def _by_heads(self, lines: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """phi(q), phi(k), v in float32 at least: the sums run over everything."""
        wide = torch.promote_types(lines["q"].dtype, torch.float32)
        q, k, v = (lines[n].to(wide).unflatten(-1, (self.n_heads, self.head_dim)) for n in "qkv")
        return elu_plus_one(q), elu_plus_one(k), v

    def _output(self, o: Float[Tensor, "B T H V1"], x: Tensor) -> Float[Tensor, "B T D"]:
        """Divide by the normaliser, which came along as the last channel."""
        return self.o_proj((o[..., :-1] / (o[..., -1:] + EPS)).flatten(2).to(x.dtype))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self._by_heads(lines_reference(self, "qkv", x))
        S, z, outs = k.new_zeros(*k[:, 0].shape, self.head_dim), k.new_zeros(k[:, 0].shape), []
        for t in range(x.shape[1]):
            S, z = S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t]), z + k[:, t]
            read, norm = torch.einsum("bhkv,bhk->bhv", S, q[:, t]), (z * q[:, t]).sum(-1, keepdim=True)
            outs.append(read / (norm + EPS))
        return self.o_proj(torch.stack(outs, 1).flatten(2).to(x.dtype))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return outer_flops(T, B, self.n_heads, self.head_dim, self.head_dim + 1, mode, "none", self.config.chunk_size)
