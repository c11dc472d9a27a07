r"""MetaLA: gated linear attention without keys: what a channel forgets is how strongly it writes.

    S_t = D(alpha_t) S_{t-1} + (1 - alpha_t) v_t^T        o_t = S_t^T q_t / sqrt(K) + sigmoid(a_t v_t)

    alpha_t = sigmoid(W_a x'_t)^(1/16)                    a_t = q_t . (w * (1 - alpha_t))
    x' = silu(conv(x))        q, v = W x'                 y_t = W_o (silu(W_g x'_t + b) * norm_h(o_t))

The second term of o_t is the self-augmentation, by which a token attends to itself; w starts at zero. norm_h takes each
head to mean 0 and variance 1. The convolution stands before all projections, and keys are half as wide as values,
as in the authors' code. Weights are named as there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.head_norm import HeadNorm
from slipstream.layers.linear import Linear
from slipstream.layers.short_conv import ShortConv
from slipstream.ops.outer_scan import outer_flops, outer_scan, outer_step
from slipstream.ops.silu_gate import silu_gate


class MetaLA(Mixer, name="metala", family="linear"):
    paper = "Chou et al. 2024, arXiv:2411.10741; layout: authors' code (BICLab/MetaLA)"
    use_when = "texts are long and parameters few: there is no key projection, forgetting and writing are one gate"
    writes, erases = "(1 - alpha) v^T", "nothing"
    decays, reads = "a number a key channel, from x", "S^T q + sigmoid(a v)"
    train_order, decode_order = "T", "1"
    symbols = {"alpha": "exp(log_decay)", "w": "aug_balance", "W_a": "k_gate", "tau": "gate_normaliser"}
    oracle = "the authors' layer by a loop in numpy, tests/oracles/feature_attention.npz"

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 128, as in the paper
        gate_normaliser: float = 16.0  # the gate's logarithm is divided by this, which keeps it near 1
        conv_size: int = 4  # width of the short convolution on the input
        norm_eps: float = 1e-5  # of the output norm
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_heads=2, gate_normaliser=2.0, conv_size=3, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D, self.n_heads = config.d_model, heads(config.d_model, config.n_heads, 128)
        self.k_head_dim, self.v_head_dim = D // 2 // self.n_heads, D // self.n_heads
        if self.v_head_dim % 2:
            raise InputError(f"keys are half a head wide: d_model / n_heads = {self.v_head_dim} must be even")
        self.conv1d = ShortConv(D, config.conv_size)
        self.q_proj, self.k_gate = Linear(D, D // 2, bias=False), Linear(D, D // 2, bias=False)
        for projection in (self.q_proj, self.k_gate):
            nn.init.xavier_uniform_(projection.weight, gain=2**-2.5)
        self.v_proj, self.g_proj = Linear(D, D, bias=False), Linear(D, D)
        self.aug_balance = nn.Parameter(torch.zeros(D // 2))
        self.group_norm = HeadNorm(self.n_heads, D, config.norm_eps, affine=False)
        self.out_proj = Linear(D, D, bias=False)

    def slots(self) -> dict[str, Slot]:
        return {"S": Slot((self.n_heads, self.k_head_dim, self.v_head_dim)), "conv": self.conv1d.slot()}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        x, conv = self.conv1d(x, state["conv"], lengths)
        q, k, v, log_decay = self._gated(x)
        scale, chunk_size = self.k_head_dim**-0.5, self.config.chunk_size
        o, S = outer_scan(q, k, v, log_decay, state["S"], lengths, scale, chunk_size)
        return self._output(o, q, k, v, x), state.advance(x.shape[1] if lengths is None else lengths, S=S, conv=conv)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        x, conv = self.conv1d(x, state["conv"])
        q, k, v, log_decay = self._gated(x)
        o, S = outer_step(q, k, v, log_decay, state["S"], self.k_head_dim**-0.5)
        return self._output(o, q, k, v, x), state.advance(1, S=S, conv=conv)

    def _gated(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, 1 - alpha, v and log alpha by heads, in float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        q, gate, v = (p(x).to(wide).unflatten(-1, (self.n_heads, -1)) for p in (self.q_proj, self.k_gate, self.v_proj))
        log_decay = F.logsigmoid(gate) / self.config.gate_normaliser
        return q, -torch.expm1(log_decay), v, log_decay

    def _output(self, o: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Float[Tensor, "B T D"]:
        """With the self-augmentation, in o's precision up to the norm."""
        to_itself = (q * self.aug_balance.to(q.dtype).unflatten(0, (self.n_heads, -1)) * k).sum(-1, keepdim=True)
        o = self.group_norm(o + (to_itself * v).sigmoid())
        return self.out_proj(silu_gate(o.to(x.dtype), self.g_proj(x)))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        x = self.conv1d.reference(x)
        q, _, v, log_decay = self._gated(x)
        alpha, S, outs = log_decay.exp(), v.new_zeros(*q[:, 0].shape, self.v_head_dim), []
        for t in range(x.shape[1]):
            S = torch.diag_embed(alpha[:, t]) @ S + (1 - alpha[:, t])[..., None] * v[:, t, :, None, :]
            outs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) / self.k_head_dim**0.5)
        return self._output(torch.stack(outs, 1), q, 1 - alpha, v, x)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        K, V = self.k_head_dim, self.v_head_dim
        return outer_flops(T, B, self.n_heads, K, V, mode, "channel", self.config.chunk_size)
