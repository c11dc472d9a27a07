"""The learning rate as a function of how much of the run is done: no state, so nothing to resume."""

from __future__ import annotations

import math

from slipstream.train.config import Recipe


def lr_share(done: float, recipe: Recipe) -> float:
    """Learning rate over its highest, at `done` in [0, 1] of the run: a linear rise, then

    cosine   (1 + cos(pi * rest)) / 2, to 0 at the end (Loshchilov & Hutter 2017, arXiv:1608.03983)
    wsd      1 until the last `decay` of the run, then 1 - sqrt(rest of it), to 0 (arXiv:2405.18392)
    """
    if done < recipe.warmup:
        return done / recipe.warmup
    if recipe.schedule == "cosine":
        rest = (done - recipe.warmup) / max(1 - recipe.warmup, 1e-9)
        return (1 + math.cos(math.pi * min(rest, 1.0))) / 2
    into = (done - (1 - recipe.decay)) / max(recipe.decay, 1e-9)
    return 1 - math.sqrt(min(max(into, 0.0), 1.0))
