"""What a model is trained for: next tokens now; diffusion, classification and forecasting keep the same contract."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Loss:
    """A sum, so that parts of a batch and batches of a validation set add up exactly."""

    nats: Float[Tensor, ""]  # negative log-likelihood, summed over the predictions
    predictions: int

    @property
    def mean(self) -> Float[Tensor, ""]:
        return self.nats / max(self.predictions, 1)


class Objective(ABC):
    """Turns a batch into a loss. Any randomness comes from the generator, which the trainer seeds by (seed, step)."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Int[Tensor, "B L"], generator: torch.Generator) -> Loss:
        """The loss of one batch, differentiable."""


def bits_per_byte(nats: float, n_bytes: float) -> float:
    """Nats of negative log-likelihood over so many bytes of text: the one figure that compares any tokenizers."""
    return nats / math.log(2) / n_bytes
