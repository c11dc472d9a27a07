"""What goes out: next-token logits now; other objectives each get a head here."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from slipstream.layers.linear import Linear
from slipstream.models.config import ModelConfig


class NextTokenHead(nn.Module):
    """h (B T D) -> logits (B T V), by the embedding's own matrix when tied (Press & Wolf 2016, arXiv:1608.05859)."""

    def __init__(self, config: ModelConfig, tied_to: nn.Embedding | None) -> None:
        super().__init__()
        self.proj = Linear(config.d_model, config.vocab_size, bias=config.head_bias)
        self.scale, self.cap = config.logit_scale, config.logit_cap
        if tied_to is not None:
            self.proj.weight = tied_to.weight

    def forward(self, h: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        logits = self.proj(h)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
