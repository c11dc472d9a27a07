"""What comes in, as vectors: tokens now; series, audio, images and DNA each get a class here."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.layers.stream_norm import stream_norm
from slipstream.models.config import ModelConfig


class TokenEmbedding(nn.Embedding):
    """ids (B T) -> (B T D), started small (0.02) so that a tied head begins near a uniform guess."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.vocab_size, config.d_model)
        self.scale = config.embedding_scale
        self.norm = stream_norm(config.norm, config.d_model, config.norm_eps) if config.embedding_norm else None

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:  # type: ignore[override]
        h = self.rows(tokens)
        if self.scale != 1:
            h = h * torch.tensor(self.scale, dtype=h.dtype, device=h.device)  # rounded to its dtype, as in Gemma
        return h if self.norm is None else self.norm(h)

    def rows(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Of the matrix, as they are."""
        return super().forward(tokens)
