"""Lines: q, k, v (or any named few) of one input, each by its own projection and, where asked, short convolution.

Weights stay where checkpoints have them: `q_proj` and `q_conv1d` of the mixer itself, for a line called q.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.mixer import Mixer
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.short_conv import ShortConv


def add_lines(mixer: Mixer, widths: dict[str, int], conv_size: int) -> None:
    """Give the mixer <name>_proj and, when conv_size is not 0, <name>_conv1d, for each line."""
    for name, width in widths.items():
        mixer.add_module(f"{name}_proj", Linear(mixer.config.d_model, width, bias=False))
    for name, width in widths.items() if conv_size else ():
        mixer.add_module(f"{name}_conv1d", ShortConv(width, conv_size))


def line_slots(mixer: Mixer) -> dict[str, Slot]:
    """The convolutions' states."""
    return {f"conv_{name}": conv.slot() for name, conv in _convs(mixer).items()}


def run_lines(
    mixer: Mixer, names: str, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The lines, and the convolutions' new states under their slots' names."""
    lines, states = _projected(mixer, names, x), {}
    for name, conv in _convs(mixer).items():
        lines[name], states[f"conv_{name}"] = conv(lines[name], state[f"conv_{name}"], lengths)
    return lines, states


def lines_reference(mixer: Mixer, names: str, x: Float[Tensor, "B T D"]) -> dict[str, Tensor]:
    """The same over a whole sequence, by torch's own convolution."""
    lines = _projected(mixer, names, x)
    return lines | {name: conv.reference(lines[name]) for name, conv in _convs(mixer).items()}


def silu_unless_convolved(mixer: Mixer) -> Callable[[Tensor], Tensor]:
    """The activation a line still lacks: its convolution brings one."""
    return _unchanged if _convs(mixer) else F.silu


def _unchanged(line: Tensor) -> Tensor:
    return line


def _projected(mixer: Mixer, names: str, x: Tensor) -> dict[str, Tensor]:
    return {name: getattr(mixer, f"{name}_proj")(x) for name in names}


def _convs(mixer: Mixer) -> dict[str, ShortConv]:
    """By line. Read at every token, so not by named_children, which walks all of them."""
    return {n.removesuffix("_conv1d"): m for n, m in mixer._modules.items() if isinstance(m, ShortConv)}
