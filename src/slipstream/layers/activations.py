"""Activations by the names that Hugging Face checkpoints use for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.ops.silu_gate import silu_gate

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


def relu2(x: Tensor) -> Tensor:
    """relu(x)^2 (Primer, So et al. 2021, arXiv:2109.08668)."""
    return torch.relu(x).square()


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": torch.relu,
    "relu2": relu2,
}


def _gated(activate: Callable[[Tensor], Tensor], x: Tensor, gate: Tensor) -> Tensor:
    return x * activate(gate)


GATED: dict[Activation, Callable[[Tensor, Tensor], Tensor]] = {
    name: silu_gate if name == "silu" else partial(_gated, activate) for name, activate in ACTIVATIONS.items()
}  # x * activation(gate)
