"""What a preset's published model weighs and remembers, counted on a model without storage."""

from __future__ import annotations

from typing import TypedDict

import torch

from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel
from slipstream.models.presets import Published

CONTEXTS = (4096, 32768, 262144)


class Sizes(TypedDict):
    """Parameters; those that one token uses, by an even router; and bytes of one sequence's state by its length."""

    parameters: int
    active_parameters: int
    state_bytes: dict[int, int]


def without_storage(published: Published) -> LanguageModel:
    """The published model in bfloat16, as it is served. States of recurrences stay in float32."""
    with torch.device("meta"):
        return LanguageModel(ModelConfig(**published.settings)).bfloat16()


def sizes(published: Published) -> Sizes:
    model = without_storage(published)
    return Sizes(
        parameters=model.n_parameters(),
        active_parameters=model.n_active_parameters(),
        state_bytes={T: model.state_bytes(T) for T in CONTEXTS},
    )
