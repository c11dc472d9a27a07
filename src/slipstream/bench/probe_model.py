"""The small model that a recall probe trains: two layers of the architecture's own mixers, nothing that could remember for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.bench.task import Batch
from slipstream.core.cards import card
from slipstream.models.language_model import LanguageModel, language_model
from slipstream.models.pattern import Part, parse

D_MODEL = 64
EMBEDDING_STD = 0.5  # tokens far apart from the start: with the usual 0.02 recall takes four times as long to be found
CONV_SIZE = 4
SAME: dict[str, Any] = {  # what every mixer gets that has such a setting, unless the pattern says otherwise
    "conv_size": CONV_SIZE,  # a token sees its neighbours, without which recall is learned ten times later
    "rope_base": None,  # no positions: those of a long text were never seen in the short ones that are learned from
    "expand_k": 1.0,  # these two, and d_state half of d_model, make a layer's matrix state d_model x d_model numbers (or as
    "expand_v": 1.0,  # many), whatever the mixer's own default
}


def probe_model(arch: str, vocab_size: int, seed: int, d_model: int = D_MODEL) -> LanguageModel:
    """Two layers (one of each mixer when a hybrid has more than two kinds), no feed-forward."""
    pattern, n_layers = probe_pattern(arch, d_model)
    model = language_model(pattern, n_layers=n_layers, d_model=d_model, vocab_size=vocab_size, seed=seed)
    nn.init.normal_(model.embedding.weight, std=EMBEDDING_STD, generator=torch.Generator().manual_seed(seed))
    return model


def probe_pattern(arch: str, d_model: int = D_MODEL) -> tuple[str, int]:
    """The sequence mixers of a pattern, each kind once, with the settings of SAME: the probe's pattern and its layers."""
    kinds = list(dict.fromkeys(_element(block.parts[0], d_model) for block in parse(arch)))
    return ", ".join(kinds), max(2, len(kinds))


def _element(part: Part, d_model: int) -> str:
    settings = _same(part.name, d_model) | part.settings
    inside = ", ".join(f"{k}={'none' if v is None else v}" for k, v in settings.items())
    return f"{part.name}({inside})/none"


def _same(name: str, d_model: int) -> dict[str, Any]:
    """What of SAME this mixer has: a convolution at least that wide stays, and positions stay where they cannot be left out."""
    fields = card(name).fields
    same = SAME | {"d_state": d_model // 2}
    chosen = {k: v for k, v in same.items() if k in fields and (v is not None or "None" in fields[k][0])}
    if "conv_size" in chosen and int(fields["conv_size"][1]) >= CONV_SIZE:
        del chosen["conv_size"]
    return chosen


def answer_logits(model: LanguageModel, batch: Batch) -> Float[Tensor, "B Q V"]:
    """Logits of the possible answers, at the questions only: the head costs more than the layers, and is needed nowhere else."""
    h = model.stack(model.embedding(batch.tokens))
    at = batch.asked[..., None].expand(-1, -1, h.shape[-1])
    return model.head(h.gather(1, at))[..., batch.choices]


def answers(model: LanguageModel, batch: Batch) -> Int[Tensor, "B Q"]:
    """What the model says."""
    return batch.choices[answer_logits(model, batch).argmax(-1)]


def answer_loss(logits: Float[Tensor, "B Q V"], batch: Batch) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of the right answers among the possible ones (which are numbered in a row)."""
    return F.cross_entropy(logits.flatten(0, 1), (batch.answers - batch.choices[0]).flatten())
