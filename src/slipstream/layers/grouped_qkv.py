"""Queries, keys and values by heads, with what modern attention puts on them: short convolution, norm, rotary positions."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.state import Slot, State
from slipstream.layers.norm import rms_norm
from slipstream.layers.rope import rope
from slipstream.layers.short_conv import ShortConv


class GroupedConfig(MixerConfig):
    """Settings of every softmax mixer with grouped heads."""

    n_heads: int | None = None  # query heads; default d_model / 64
    n_kv_heads: int | None = None  # key and value heads, each for a group of query heads; default n_heads
    rope_base: float | None = 10000.0  # base of the rotary positions; None for no positions (NoPE)
    qk_norm: bool = False  # RMS-normalise q and k per head before the product
    conv_size: int = 0  # width of a short convolution on q, k and v; 0 for none


class GroupedQKV(nn.Module):
    """x (B T D) -> q (B T H K), k and v (B T G K); weights q_proj, k_proj, v_proj as in Hugging Face checkpoints."""

    def __init__(self, config: GroupedConfig) -> None:
        super().__init__()
        self.config, self.n_heads = config, heads(config.d_model, config.n_heads)
        self.n_kv_heads = config.n_kv_heads or self.n_heads
        self.head_dim = config.d_model // self.n_heads
        if self.n_heads % self.n_kv_heads:
            raise InputError(f"n_heads {self.n_heads} does not divide into n_kv_heads {self.n_kv_heads} groups")
        if config.rope_base and self.head_dim % 2:
            raise InputError(
                f"rotary positions turn pairs: head_dim {self.head_dim} (d_model / n_heads) must be even, or rope_base none"
            )
        widths = {"q": config.d_model, "k": self.n_kv_heads * self.head_dim, "v": self.n_kv_heads * self.head_dim}
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(config.d_model, w, bias=False) for w in widths.values())
        self.convs = nn.ModuleDict({n: ShortConv(w, config.conv_size) for n, w in widths.items() if config.conv_size})

    def slots(self) -> dict[str, Slot]:
        return {f"conv_{n}": c.slot() for n, c in self._convs()}

    def _convs(self) -> list[tuple[str, ShortConv]]:
        return [(n, c) for n, c in self.convs.items() if isinstance(c, ShortConv)]

    def forward(
        self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """q, k, v and the new states of the convolutions; positions go on from state.length."""
        line, states = self._lines(x), {}
        for name, conv in self._convs():
            line[name], states[f"conv_{name}"] = conv(line[name], state[f"conv_{name}"], lengths)
        positions = state.length[:, None] + torch.arange(x.shape[1], device=x.device)
        return *self._by_heads(line, positions), states

    def reference(self, x: Float[Tensor, "B T D"]) -> tuple[Tensor, Tensor, Tensor]:
        line = self._lines(x)
        line |= {n: conv.reference(line[n]) for n, conv in self._convs()}
        return self._by_heads(line, torch.arange(x.shape[1]).expand(x.shape[0], -1))

    def turn(self, k: Float[Tensor, "B S G K"], by: Int[Tensor, "B S"]) -> Float[Tensor, "B S G K"]:
        """Keys as they would be so many positions later."""
        return rope(k, by, self.config.rope_base) if self.config.rope_base else k

    def _lines(self, x: Tensor) -> dict[str, Tensor]:
        return {"q": self.q_proj(x), "k": self.k_proj(x), "v": self.v_proj(x)}

    def _by_heads(self, line: dict[str, Tensor], positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (line[n].unflatten(-1, (-1, self.head_dim)) for n in "qkv")
        if self.config.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        if self.config.rope_base:
            q, k = rope(q, positions, self.config.rope_base), rope(k, positions, self.config.rope_base)
        return q, k, v
