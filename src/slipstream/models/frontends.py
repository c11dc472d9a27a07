"""What comes in, as vectors: tokens now; series, audio, images and DNA each get a class here."""

from __future__ import annotations

from torch import nn


class TokenEmbedding(nn.Embedding):
    """ids (B T) -> (B T D), started small (0.02) so that a tied head begins near a uniform guess."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
