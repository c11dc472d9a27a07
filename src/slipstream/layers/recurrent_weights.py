"""The four weights of torch.nn.RNN, LSTM and GRU, under their names: what checkpoints of one layer hold."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slipstream.core.mixer import Mixer

NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")


def add_recurrent_weights(mixer: Mixer, n_gates: int, d_hidden: int) -> None:
    """Give the mixer W (n H, D), U (n H, H) and two biases (n H), started as torch starts them."""
    width = n_gates * d_hidden
    shapes = [(width, mixer.config.d_model), (width, d_hidden), (width,), (width,)]
    for name, shape in zip(NAMES, shapes):
        mixer.register_parameter(name, nn.Parameter(torch.empty(shape).uniform_(-(d_hidden**-0.5), d_hidden**-0.5)))


def recurrent_weights(mixer: Mixer) -> list[Tensor]:
    """W, U, b, b', as the ops take them."""
    return [mixer.get_parameter(name) for name in NAMES]
