r"""The layer around TTT-Linear and TTT-MLP (Sun et al. 2024, arXiv:2407.04620): what enters the inner network and leaves it.

Queries and keys pass short convolutions and are turned by their place in the mini-batch; the step size of every token is
read from x; outputs pass a norm and a gate. As in the Mamba backbone of the authors' code, whose names the weights have,
but with a projection each for q and k.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.rope import rope
from slipstream.layers.short_conv import ShortConv
from slipstream.ops.inner_sgd import Layers, Net, averaged_reference, averaged_sgd, averaged_step, inner_sgd_flops

EPS = 1e-6  # of both norms, as in the authors' code
KINDS = "moved", "gradients"  # what the state holds of every matrix
NO_WEIGHT_DECAY = ("ttt_norm_weight", "ttt_norm_bias", "b1")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v, lr


class TTTConfig(MixerConfig):
    """Settings of both; how far a mini-batch may move the weights is each one's own."""

    n_heads: int | None = None  # heads, each with an inner network of its own; default d_model / 64
    mini_batch: int = Field(16, ge=1)  # tokens whose gradients are taken at the same weights; part of the definition
    base_lr: float = 1.0  # of the inner steps
    conv_size: int = 4  # width of the short convolution on q and k; 0 for none
    rope_base: float = 10000.0  # base of the rotary positions inside a mini-batch


class TTTBlock(nn.Module):
    """widths: of the inner network's hidden layers, as multiples of head_dim."""

    def __init__(self, config: TTTConfig, widths: Sequence[float] = ()) -> None:
        super().__init__()
        self.config, self.n_heads = config, heads(config.d_model, config.n_heads)
        self.head_dim, D = config.d_model // self.n_heads, config.d_model
        if self.head_dim % 2:
            raise InputError(f"rotary positions turn pairs: head_dim {self.head_dim} must be even; change n_heads")
        self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.o_proj = (Linear(D, D, bias=False) for _ in range(5))
        self.convs = nn.ModuleDict(
            {n: ShortConv(D, config.conv_size, bias=True, activation=False) for n in "qk" if config.conv_size}
        )
        self.lr_proj = Linear(D, self.n_heads)
        self.learnable_token_idx = nn.Parameter(torch.zeros(config.mini_batch))
        self.ttt_norm_weight = nn.Parameter(torch.ones(self.n_heads, self.head_dim))
        self.ttt_norm_bias = nn.Parameter(torch.zeros(self.n_heads, self.head_dim))
        sizes = [round(self.head_dim * w) for w in (1, *widths, 1)]
        self.shapes = list(pairwise(sizes))
        for n, (i, o) in enumerate(self.shapes, 1):
            self.register_parameter(f"W{n}", nn.Parameter(torch.randn(self.n_heads, i, o) * 0.02))
            self.register_parameter(f"b{n}", nn.Parameter(torch.zeros(self.n_heads, 1, o)))
        self.post_norm = nn.LayerNorm(D, eps=EPS)
        nn.init.normal_(self.lr_proj.weight, std=0.02)
        nn.init.zeros_(self.lr_proj.bias)

    def slots(self) -> dict[str, Slot]:
        """moved_l: the weights and biases of layer l less their start; gradients_l: the sum of this mini-batch's."""
        matrices = [Slot((self.n_heads, i + 1, o)) for i, o in self.shapes]
        kept = {f"{kind}_{n}": slot for kind in KINDS for n, slot in enumerate(matrices, 1)}
        return kept | {f"conv_{n}": c.slot() for n, c in self._convs()}

    def _convs(self) -> list[tuple[str, ShortConv]]:
        return [(n, c) for n, c in self.convs.items() if isinstance(c, ShortConv)]

    def forward(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        """What a mixer's prefill gives."""
        inputs, convs = self._inputs(x, state, lengths)
        o, kept = averaged_sgd(*inputs, self.pace(), self.net(), self._kept(state), state.length, lengths)
        return self._output(o, x), state.advance(
            x.shape[1] if lengths is None else lengths, **self._named(kept), **convs
        )

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        inputs, convs = self._inputs(x, state, None)
        o, kept = averaged_step(*inputs, self.pace(), self.net(), self._kept(state), state.length)
        return self._output(o, x), state.advance(1, **self._named(kept), **convs)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        line = self._lines(x)
        line |= {n: conv.reference(line[n]) for n, conv in self._convs()}
        inputs = self._turned(x, line, torch.arange(x.shape[1]).expand(len(x), -1))
        return self._output(averaged_reference(*inputs, self.pace(), self.net()), x)

    def net(self) -> Net:
        names = range(1, len(self.shapes) + 1)
        weights = tuple(torch.cat([self.get_parameter(f"{p}{n}") for p in "Wb"], 1) for n in names)
        return Net(weights, self.ttt_norm_weight, self.ttt_norm_bias, True, EPS)

    def pace(self) -> Float[Tensor, "M"]:
        """1/i, learned, never below 0."""
        i = torch.arange(1, self.config.mini_batch + 1, device=self.learnable_token_idx.device)
        return (1 / i.to(self.learnable_token_idx.dtype) + self.learnable_token_idx).clamp(min=0)

    def _kept(self, state: State) -> tuple[Layers, Layers]:
        moved, gradients = (tuple(state[f"{kind}_{n + 1}"] for n in range(len(self.shapes))) for kind in KINDS)
        return moved, gradients

    def _named(self, kept: tuple[Layers, Layers]) -> dict[str, Tensor]:
        return {f"{kind}_{n}": t for kind, layers in zip(KINDS, kept) for n, t in enumerate(layers, 1)}

    def _inputs(self, x: Tensor, state: State, lengths: Int[Tensor, "B"] | None) -> tuple[Inputs, dict[str, Tensor]]:
        """q, k, v, lr, and the convolutions' new states."""
        line, states = self._lines(x), {}
        for name, conv in self._convs():
            line[name], states[f"conv_{name}"] = conv(line[name], state[f"conv_{name}"], lengths)
        return self._turned(x, line, state.length[:, None] + torch.arange(x.shape[1], device=x.device)), states

    def _lines(self, x: Tensor) -> dict[str, Tensor]:
        return {"q": self.q_proj(x), "k": self.k_proj(x), "v": self.v_proj(x)}

    def _turned(self, x: Tensor, line: dict[str, Tensor], positions: Int[Tensor, "B T"]) -> Inputs:
        q, k, v = (line[n].unflatten(-1, (self.n_heads, self.head_dim)) for n in "qkv")
        place, base = positions % self.config.mini_batch, self.config.rope_base
        wide = torch.promote_types(x.dtype, torch.float32)
        lr = self.config.base_lr / self.head_dim * torch.sigmoid(self.lr_proj(x).to(wide))
        return rope(q, place, base), rope(k, place, base), v, lr

    def _output(self, o: Float[Tensor, "B T H K"], x: Tensor) -> Float[Tensor, "B T D"]:
        return self.o_proj(F.gelu(self.g_proj(x), approximate="tanh") * self.post_norm(o.flatten(2)))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        shapes = [(i + 1, o) for i, o in self.shapes]
        return inner_sgd_flops(T, B, self.n_heads, shapes, True, self.config.mini_batch, False, mode)
