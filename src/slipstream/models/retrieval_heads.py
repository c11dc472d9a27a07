"""Which key heads of a trained model find things far back: those that its predictions cannot do without.

    caches = retrieval_heads(model, tokens, window=256, share=0.5)
    cheaper = with_policies(model, cache=caches)

A head's score is what is lost when it alone keeps no more than the first tokens and a window, all others everything: the mean
divergence of the predictions, KL(all kept || that head streaming), on texts in which something far back matters. Every
head costs one reading of the texts. The paper (DuoAttention, Xiao et al. 2024, arXiv:2410.10819) learns a gate for every
head instead, on passkeys planted in long texts, and takes the heads of largest gate; what is measured here is what those gates
stand for, one head at a time, so that two heads that do the same in turn are both thought dispensable.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.models.language_model import LanguageModel
from slipstream.models.policies import cached, with_policies


def retrieval_heads(
    model: LanguageModel, tokens: Int[Tensor, "B T"], window: int = 256, share: float = 0.5
) -> list[str]:
    """The cache of every layer that has one: the share of all key heads with the largest scores keeps everything."""
    if not 0 <= share <= 1:
        raise InputError(f"a share of the heads lies between 0 and 1; got {share}")
    scores = retrieval_scores(model, tokens, window)
    ranked = sorted((-score, i, head) for i, row in enumerate(scores) for head, score in enumerate(row))
    chosen = {(i, head) for _, i, head in ranked[: round(share * len(ranked))]}
    return [_duo(window, [head for head in range(len(row)) if (i, head) in chosen]) for i, row in enumerate(scores)]


@torch.no_grad()
def retrieval_scores(model: LanguageModel, tokens: Int[Tensor, "B T"], window: int = 256) -> list[list[float]]:
    """For every layer with such a cache, the score of each of its key heads, in nats a token.

    Texts are read in pieces of a window, so that every head streams in most of them: T must be larger than two of them.
    """
    if tokens.shape[1] <= 2 * window + 4:
        raise InputError(
            f"texts of {tokens.shape[1]} tokens are too short to tell what lies behind a window of {window}: give more than "
            f"{2 * window + 4}, or a smaller window"
        )
    whole = with_policies(model, cache="full", prefill_policy="dense")
    wanted = _predictions(whole, tokens, window)
    n_heads = [cast(Any, mixer).cache.kv.n_kv_heads for mixer in cached(whole)]
    scores: list[list[float]] = []
    for i, n in enumerate(n_heads):
        scores.append([])
        for streaming in range(n):
            caches = ["full"] * len(n_heads)
            caches[i] = _duo(window, [head for head in range(n) if head != streaming])
            found = _predictions(with_policies(whole, cache=caches), tokens, window)
            scores[i].append((wanted.exp() * (wanted - found)).sum(-1).mean().item())
    return scores


def _duo(window: int, heads: list[int]) -> str:
    return f"duo_attention:{window}:{'+'.join(map(str, heads)) or 'none'}"


def _predictions(model: LanguageModel, tokens: Tensor, piece: int) -> Float[Tensor, "B T V"]:
    """Logarithms of probabilities."""
    state, logits = model.init_state(*tokens.shape), []
    for part in tokens.split(piece, 1):
        of_part, state = model.prefill(part, state, logits="all")
        logits.append(cast(Tensor, of_part))
    return torch.cat(logits, 1).log_softmax(-1)
