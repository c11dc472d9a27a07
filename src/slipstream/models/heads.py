"""What goes out: next-token logits now; other objectives each get a head here."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from slipstream.layers.linear import Linear


class NextTokenHead(nn.Module):
    """h (B T D) -> logits (B T V), by the embedding's own matrix when tied (Press & Wolf 2016, arXiv:1608.05859)."""

    def __init__(self, d_model: int, vocab_size: int, tied_to: nn.Embedding | None) -> None:
        super().__init__()
        self.proj = Linear(d_model, vocab_size, bias=False)
        if tied_to is not None:
            self.proj.weight = tied_to.weight

    def forward(self, h: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        return self.proj(h)
