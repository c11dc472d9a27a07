r"""Lightning attention (TransNormerLLM, MiniMax-01): linear attention that fades at a fixed pace in each head.

    S_t = exp(-s_h) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t        q, k, v = silu(W x)

    s_h = 2^(-8 h / H) (1 - depth + 1e-5), h = 1..H        y_t = W_o (sigmoid(W_g x_t) * rmsnorm(o_t))

The layer of MiniMax-01. Its paces depend on where a layer stands: the first forgets fastest, the last nearly nothing.
The name is that of the algorithm, chunks of matrix products with one state between them, which is that of outer_scan.
The norm is over all heads together. Weights are named and laid out as in transformers' MiniMaxLightningAttention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, PositiveInt
from torch import Tensor

from slipstream.core.config import MixerConfig, heads
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.norm import RMSNorm
from slipstream.ops.outer_scan import outer_flops, outer_scan, outer_step


class LightningAttention(Mixer, name="lightning_attention", family="linear"):
    paper = "Qin et al. 2024, arXiv:2401.04658 and 2405.17381; as in MiniMax-01: MiniMax 2025, arXiv:2501.08313"
    use_when = "texts are very long: as most of the layers of a hybrid, with a few of exact attention among them"
    writes, erases = "k v^T", "nothing"
    decays, reads = "one fixed number a head", "S^T q"
    train_order, decode_order = "T", "1"
    symbols = {"lambda": "exp(-s_h)", "s_h": "slope", "W_g": "output_gate"}
    oracle = "transformers MiniMaxLightningAttention, tests/oracles/test_feature_attention_oracles.py"

    class Config(MixerConfig):
        n_heads: int | None = None  # heads, one pace each; default d_model / 64
        head_dim: PositiveInt | None = None  # width of a head; default d_model / n_heads
        depth: float = Field(0.5, ge=0, le=1)  # where the layer stands: 0 first, 1 last, l / (L - 1) for layer l of L
        norm_eps: float = 1e-6  # of the output norm
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_heads=2, depth=0.25, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads = config.n_heads if config.n_heads and config.head_dim else heads(config.d_model, config.n_heads)
        self.head_dim = config.head_dim or config.d_model // self.n_heads
        width = self.n_heads * self.head_dim
        self.qkv_proj = Linear(config.d_model, 3 * width, bias=False)
        self.output_gate = Linear(config.d_model, width, bias=False)
        self.norm = RMSNorm(width, config.norm_eps)
        self.out_proj = Linear(width, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        return {"S": Slot((self.n_heads, self.head_dim, self.head_dim))}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        chunk_size = self.config.chunk_size
        o, S = outer_scan(*self._qkv(x), self._log_decay(x), state["S"], lengths, chunk_size=chunk_size)
        return self._output(o, x), state.advance(x.shape[1] if lengths is None else lengths, S=S)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        o, S = outer_step(*self._qkv(x), self._log_decay(x), state["S"])
        return self._output(o, x), state.advance(1, S=S)

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """They stand side by side in each head."""
        q, k, v = F.silu(self.qkv_proj(x)).unflatten(-1, (self.n_heads, 3, self.head_dim)).unbind(3)
        return q, k, v

    def _log_decay(self, like: Tensor) -> Float[Tensor, "H"]:
        wide = torch.promote_types(like.dtype, torch.float32)
        h = torch.arange(1, self.n_heads + 1, device=like.device, dtype=wide)
        return -(2.0 ** (-8 * h / self.n_heads)) * (1 - self.config.depth + 1e-5)

    def _output(self, o: Float[Tensor, "B T H V"], x: Tensor) -> Float[Tensor, "B T D"]:
        return self.out_proj(self.output_gate(x).sigmoid() * self.norm(o.flatten(2)))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self._qkv(x)
        kept = self._log_decay(x).exp()[:, None, None]
        S, outs = v.new_zeros(*k[:, 0].shape, self.head_dim), []
        for t in range(x.shape[1]):
            S = kept * S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
            outs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
        return self._output(torch.stack(outs, 1), x)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        K = self.head_dim
        return outer_flops(T, B, self.n_heads, K, K, mode, "head", self.config.chunk_size)
