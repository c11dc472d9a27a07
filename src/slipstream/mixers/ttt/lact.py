r"""LaCT: a SwiGLU network that learns once per large chunk of tokens, beside attention to a window.

    o_t = f(q_t; W)     f(x; W) = W_1 (silu(W_0 x) * W_2 x)     at a chunk's end: W <- norm(W + muon(G)), G <- g + m G
    g = sum over the chunk of eta_s grad_W (f(k_s; W) . v_s)     eta_s = softplus(w . x_s + c)     m = mean sigmoid(w . x_s + c)

    y_t = W_o (sum_{t-window < s <= t} softmax_s(a_t . b_s / sqrt(K)) v'_s + silu(w . x_t + c) * rmsnorm(o_t))
    a, b = rope(W x)    q, k = rope(l2(silu(scale * W x + offset)))    v' = W x    v = silu(v')

norm brings every column of a matrix back to the length with which it began. Tokens read what earlier chunks wrote; their
own chunk they see through the window. The chunk is part of the definition, its borders at multiples of its size. A step that
muon evens is as large as W: gradients grow by a quarter or so with each, so chunks should be long, and steps few. The layer
of the authors' language models, but the learned start of W has full rank, and Muon runs in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.norm import RMSNorm
from slipstream.layers.rope import rope
from slipstream.ops.attention import attention_flops, window_attention
from slipstream.ops.attention import reference as softmax_reference
from slipstream.ops.l2_norm import l2_norm
from slipstream.ops.swiglu_sgd import ChunkState, Matrices, swiglu_flops, swiglu_sgd, swiglu_step
from slipstream.ops.swiglu_sgd import reference as swiglu_reference
from slipstream.ops.valid import last_tokens, zero_padding

KINDS = "moved", "sums", "momentum"  # what the state holds of each of the three matrices
FIRST_LR = 0.001  # eta at the start, as in the authors' code


class LaCT(Mixer, name="lact", family="ttt"):
    paper = "Zhang et al. 2025, arXiv:2505.23884, sec. 3; the layer, its rates and constants: the authors' lact_llm"
    use_when = "very long contexts: a memory as large as the model's weights, at the speed of large matrix products"
    train_order, decode_order = "T", "1"
    writes = "eta grad (f(k; W) . v), once a chunk"
    erases = "nothing"
    decays = "all alike, by the norm"
    reads = "W_1 (silu(W_0 q) * W_2 q), and a window"
    symbols = {"W": "fast plus the slots moved", "eta": "lr", "b": "mini_batch, the chunk"}
    oracle = "the rule with its gradients by hand in numpy, tests/oracles/xlstm_ttt.npz"
    no_weight_decay = ("qk_scale", "qk_offset")

    class Config(MixerConfig):
        n_heads: int | None = None  # heads of the window attention; default d_model / 64
        n_fast_heads: int | None = None  # networks side by side; default about d_model / 96
        expand: float = 1.0  # width of the networks' hidden layers as a multiple of their heads' width
        mini_batch: int = Field(256, ge=1)  # tokens of a chunk, between two steps of learning; part of the definition
        window: int | None = None  # tokens that attention sees; default mini_batch, which loses none
        muon: bool = True  # whether steps are orthogonalised
        rope_base: float = 10000.0  # base of the rotary positions of both

    config: Config
    tiny = Config(d_model=16, n_heads=4, n_fast_heads=2, expand=1.5, mini_batch=4, window=5)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D = config.d_model
        self.n_heads, self.n_fast = heads(D, config.n_heads), heads(D, config.n_fast_heads, 96)
        self.head_dim, self.fast_dim, self.window = (
            D // self.n_heads,
            D // self.n_fast,
            config.window or config.mini_batch,
        )
        if self.head_dim % 2:
            raise InputError(f"rotary positions turn pairs: head_dim {self.head_dim} must be even; change n_heads")
        self.hidden = round(self.fast_dim * config.expand)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Linear(D, D, bias=False) for _ in range(4))
        self.qk_scale, self.qk_offset = nn.Parameter(torch.ones(2, D)), nn.Parameter(torch.zeros(2, D))
        shapes = [(self.fast_dim, self.hidden), (self.hidden, self.fast_dim), (self.fast_dim, self.hidden)]
        self.fast = nn.ParameterList(torch.randn(self.n_fast, i, o) * i**-0.5 for i, o in shapes)
        self.lr_proj = Linear(D, 3 * self.n_fast)
        self.momentum_proj, self.scale_proj = Linear(D, self.n_fast), Linear(D, self.n_fast)
        self.fast_norm = RMSNorm(self.fast_dim, eps=1e-5)

    def slots(self) -> dict[str, Slot]:
        past = Slot((self.window - 1, self.n_heads, self.head_dim), dtype=None)
        matrices = {f"{kind}_{n}": Slot(tuple(w.shape)) for kind in KINDS for n, w in enumerate(self.fast)}
        return {"k": past, "v": past, **matrices, "gates": Slot((self.n_fast,))}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        return self._read(x, state, lengths, partial(swiglu_sgd, lengths=lengths))

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        return self._read(x, state, None, swiglu_step)

    def _read(self, x: Tensor, state: State, lengths: Int[Tensor, "B"] | None, learn: Callable[..., Any]):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        positions = state.length[:, None] + torch.arange(x.shape[1], device=x.device)
        line, learning = self._fast(q, k, v, positions), (self._start(), self.config.mini_batch, self.config.muon)
        o, chunk = learn(*line, *self._rates(x), *learning, state=self._chunk(state), position=state.length)
        q, k, v = self._near(q, k, v, positions)
        k, v = (torch.cat([state[n], zero_padding(new, lengths)], 1) for n, new in (("k", k), ("v", v)))
        near = window_attention(q, k, v, state.length, self.window)
        past = {n: last_tokens(line, self.window - 1, lengths) for n, line in (("k", k), ("v", v))}
        read = x.shape[1] if lengths is None else lengths
        return self._output(near, o, x), state.advance(read, **past, **_named(chunk))

    def _near(self, q: Tensor, k: Tensor, v: Tensor, positions: Int[Tensor, "B T"]) -> tuple[Tensor, Tensor, Tensor]:
        """What attention gets."""
        q, k, v = (t.unflatten(-1, (self.n_heads, self.head_dim)) for t in (q, k, v))
        return rope(q, positions, self.config.rope_base), rope(k, positions, self.config.rope_base), v

    def _fast(self, q: Tensor, k: Tensor, v: Tensor, positions: Int[Tensor, "B T"]) -> tuple[Tensor, Tensor, Tensor]:
        """What the network gets: by its own heads, but turned by those of attention."""
        wide = torch.promote_types(q.dtype, torch.float32)
        lines = []
        for n, t in enumerate((q, k)):
            t = F.silu(t.to(wide) * self.qk_scale[n] + self.qk_offset[n])
            t = l2_norm(t.unflatten(-1, (self.n_fast, self.fast_dim))).flatten(2)
            t = rope(t.unflatten(-1, (self.n_heads, self.head_dim)), positions, self.config.rope_base)
            lines.append(t.flatten(2).unflatten(-1, (self.n_fast, self.fast_dim)))
        return lines[0], lines[1], F.silu(v.to(wide)).unflatten(-1, (self.n_fast, self.fast_dim))

    def _rates(self, x: Tensor) -> tuple[Float[Tensor, "B T H 3"], Float[Tensor, "B T H"]]:
        """Step sizes of the three matrices, and the share of the momentum, in float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        lr = F.softplus(self.lr_proj(x).to(wide) + math.log(math.expm1(FIRST_LR)))
        return lr.unflatten(-1, (self.n_fast, 3)), torch.sigmoid(self.momentum_proj(x).to(wide))

    def _start(self) -> Matrices:
        W_0, W_1, W_2 = self.fast
        return W_0, W_1, W_2

    def _chunk(self, state: State) -> ChunkState:
        moved, sums, momentum = ((state[f"{k}_0"], state[f"{k}_1"], state[f"{k}_2"]) for k in KINDS)
        return ChunkState(moved, sums, momentum, state["gates"])

    def _output(self, near: Float[Tensor, "B T H K"], o: Tensor, x: Tensor) -> Float[Tensor, "B T D"]:
        far = self.fast_norm(o).to(x.dtype) * F.silu(self.scale_proj(x))[..., None]
        return self.o_proj(near.flatten(2) + far.flatten(2))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        positions = torch.arange(x.shape[1]).expand(len(x), -1)
        fast = (*self._fast(q, k, v, positions), *self._rates(x))
        near = softmax_reference(*self._near(q, k, v, positions), window=self.window)
        return self._output(near, swiglu_reference(*fast, self._start(), self.config.mini_batch, self.config.muon), x)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        near = attention_flops(T, B, self.n_heads, self.head_dim, mode, self.window)
        sizes = (self.n_fast, self.fast_dim, self.hidden, self.config.mini_batch)
        return near + swiglu_flops(T, B, *sizes, self.config.muon, mode)


def _named(chunk: ChunkState) -> dict[str, Tensor]:
    """The state's slots."""
    kinds = zip(KINDS, (chunk.moved, chunk.sums, chunk.momentum))
    return {f"{kind}_{n}": t for kind, matrices in kinds for n, t in enumerate(matrices)} | {"gates": chunk.gates}
