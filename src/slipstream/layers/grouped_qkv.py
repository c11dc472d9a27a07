"""Queries, keys and values by heads, with what modern attention puts on them: short convolution, norm, rotary positions."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import PositiveFloat
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.rope import partial_rope, turns
from slipstream.layers.rope_scaling import rope_scaling
from slipstream.layers.short_conv import ShortConv
from slipstream.layers.stream_norm import Norm, stream_norm
from slipstream.ops.rotate import rotate

QKNorm = Literal["plus_one", "whole"]  # per head with weights less one (Gemma 3); over all heads together (OLMo 2)


class GroupedConfig(MixerConfig):
    """Settings of every softmax mixer with grouped heads."""

    n_heads: int | None = None  # query heads; default d_model / 64
    n_kv_heads: int | None = None  # key and value heads, each for a group of query heads; default n_heads
    rope_base: float | None = 10000.0  # base of the rotary positions; None for no positions (NoPE)
    rope_fraction: float = 1.0  # share of a head's channels that positions turn, the first ones
    rope_scaling: str | None = None  # positions stretched beyond the trained length, e.g. yarn:factor=4:original=8192
    qk_norm: bool | QKNorm = False  # RMS norms of q and k before positions: true per head, or plus_one, or whole
    qk_norm_eps: PositiveFloat = 1e-6  # added under their roots
    qkv_bias: bool = False  # biases on the projections to q, k and v (Qwen2)
    conv_size: int = 0  # width of a short convolution on q, k and v; 0 for none


class GroupedQKV(nn.Module):
    """x (B T D) -> q (B T H K), k and v (B T G K); weights q_proj, k_proj, v_proj, q_norm, k_norm as in Hugging Face checkpoints.

    own_kv False: queries alone, for a mixer that reads the keys and values of another. head_dim: for a mixer whose heads may
    be wider or narrower than d_model / n_heads; all of q is `width` wide.
    """

    def __init__(self, config: GroupedConfig, own_kv: bool = True, head_dim: int | None = None) -> None:
        super().__init__()
        self.config, self.n_heads = config, _n_heads(config, head_dim)
        self.n_kv_heads = config.n_kv_heads or self.n_heads
        self.head_dim = head_dim or config.d_model // self.n_heads
        self.width = self.n_heads * self.head_dim
        if self.n_heads % self.n_kv_heads:
            raise InputError(f"n_heads {self.n_heads} does not divide into n_kv_heads {self.n_kv_heads} groups")
        turned = int(config.rope_fraction * self.head_dim)
        if config.rope_base and (turned % 2 or not 0 < config.rope_fraction <= 1):
            raise InputError(
                f"rotary positions turn pairs: rope_fraction {config.rope_fraction:g} of head_dim {self.head_dim} "
                f"(d_model / n_heads) is {turned}, and must be even and within it; or set rope_base none"
            )
        self.scaling = rope_scaling(config.rope_scaling)
        if self.scaling and not config.rope_base:
            raise InputError(f"rope_scaling {config.rope_scaling} stretches rotary positions: set rope_base too")
        widths = {"q": self.width, "k": self.n_kv_heads * self.head_dim, "v": self.n_kv_heads * self.head_dim}
        widths = {n: w for n, w in widths.items() if own_kv or n == "q"}
        self.names = tuple(widths)
        for name, width in widths.items():
            self.add_module(f"{name}_proj", Linear(config.d_model, width, bias=config.qkv_bias))
            if config.qk_norm and name != "v":
                self.add_module(f"{name}_norm", self._norm(width))
        self.convs = nn.ModuleDict({n: ShortConv(w, config.conv_size) for n, w in widths.items() if config.conv_size})

    def _norm(self, width: int) -> nn.Module:
        kind: Norm = "rms_plus_one" if self.config.qk_norm == "plus_one" else "rms"
        return stream_norm(kind, width if self.config.qk_norm == "whole" else self.head_dim, self.config.qk_norm_eps)

    def slots(self) -> dict[str, Slot]:
        return {f"conv_{n}": c.slot() for n, c in self._convs()}

    def _convs(self) -> list[tuple[str, ShortConv]]:
        return [(n, c) for n, c in self.convs.items() if isinstance(c, ShortConv)]

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: State,
        lengths: Int[Tensor, "B"] | None = None,
        adapters: nn.ModuleDict | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """q, k, v and the new states of the convolutions; positions go on from state.length. adapters: what is added to the
        projections of x to q, k and v."""
        heads, states = self._heads(x, state, lengths, adapters)
        return *self._all(heads), states

    def queries(
        self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None
    ) -> tuple[Float[Tensor, "B T H K"], dict[str, Tensor]]:
        """The same without keys and values."""
        heads, states = self._heads(x, state, lengths)
        return heads["q"], states

    def reference(
        self, x: Float[Tensor, "B T D"], adapters: nn.ModuleDict | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        line = self._lines(x, adapters)
        line |= {n: conv.reference(line[n]) for n, conv in self._convs()}
        return self._all(self._by_heads(line, torch.arange(x.shape[1]).expand(x.shape[0], -1)))

    def turn(self, k: Float[Tensor, "B S G K"], by: Int[Tensor, "B S"]) -> Float[Tensor, "B S G K"]:
        """Keys as they would be so many positions later."""
        c = self.config
        return partial_rope(k, by, c.rope_base, c.rope_fraction, self.scaling) if c.rope_base else k

    def _heads(
        self, x: Tensor, state: State, lengths: Tensor | None, adapters: nn.ModuleDict | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        line, states = self._lines(x, adapters), {}
        for name, conv in self._convs():
            line[name], states[f"conv_{name}"] = conv(line[name], state[f"conv_{name}"], lengths)
        return self._by_heads(line, state.length[:, None] + torch.arange(x.shape[1], device=x.device)), states

    def _lines(self, x: Tensor, adapters: nn.ModuleDict | None) -> dict[str, Tensor]:
        lines = {n: self.get_submodule(f"{n}_proj")(x) for n in self.names}
        return lines if not adapters else {n: line + adapters[n](x) for n, line in lines.items()}

    def _by_heads(self, line: dict[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
        turned, norm = [n for n in line if n != "v"], self.config.qk_norm
        if norm == "whole":
            line = line | {n: self.get_submodule(f"{n}_norm")(line[n]) for n in turned}
        heads = {n: t.unflatten(-1, (-1, self.head_dim)) for n, t in line.items()}
        if norm and norm != "whole":
            heads |= {n: self.get_submodule(f"{n}_norm")(heads[n]) for n in turned}
        return heads | self._placed({n: heads[n] for n in turned}, positions)

    def _placed(self, heads: dict[str, Tensor], positions: Int[Tensor, "B T"]) -> dict[str, Tensor]:
        """Turned by their positions, and as long as a scaling of positions asks."""
        base, turned = self.config.rope_base, int(self.config.rope_fraction * self.head_dim)
        if not base:
            return heads
        by = turns(positions, turned, base, self.scaling, heads["q"].dtype)
        heads = {n: rotate(x, *by) for n, x in heads.items()}
        if self.scaling is None or (magnitude := self.scaling.magnitude) == 1:
            return heads
        return {n: torch.cat([x[..., :turned] * magnitude, x[..., turned:]], -1) for n, x in heads.items()}

    def _all(self, heads: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        if "k" not in heads:
            raise InputError(
                "a layer with own_kv=false reads the keys and values of a layer before it: it runs in a model only"
            )
        return heads["q"], heads["k"], heads["v"]


def _n_heads(config: GroupedConfig, head_dim: int | None) -> int:
    """Heads of a width of their own need not divide d_model."""
    if head_dim is None:
        return heads(config.d_model, config.n_heads)
    return config.n_heads or max(1, config.d_model // head_dim)
