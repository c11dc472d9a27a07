"""Tiny untrained models: what is tested is how they are used, not what they know."""

from __future__ import annotations

import pytest
import torch

from slipstream.data.tokenizer import byte_tokenizer
from slipstream.models.language_model import LanguageModel, language_model

PATTERNS = {"attention(conv_size=3)/none": 1, "lstm/none, attention": 2}  # pattern -> layers


@pytest.fixture(params=PATTERNS)
def model(request) -> LanguageModel:
    """Bytes in and out; the logits are spread so that sampling has something to choose from."""
    made = language_model(request.param, n_layers=PATTERNS[request.param], d_model=16, seed=1, tie_embeddings=False)
    made.tokenizer = byte_tokenizer()
    with torch.no_grad():
        made.embedding.weight.mul_(50)
        made.head.proj.weight.mul_(4)
        made.head.proj.weight[128:] *= 0.1  # mostly ASCII
    return made
