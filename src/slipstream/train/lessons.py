"""Losses that teach parts which only choose (core/auxiliary.py): what is told of them, and their gradients kept apart."""

from __future__ import annotations

import math

import torch
from torch import nn

from slipstream.core.auxiliary import Collector
from slipstream.core.mixer import Mixer
from slipstream.models.language_model import LanguageModel


def losses(model: LanguageModel, collector: Collector) -> dict[str, float] | None:
    """The mean of each in this step, by the place of the layer ("block.mixer"). None of a model without such parts."""
    means = {pupil: round(torch.stack(found).mean().item(), 6) for pupil, found in collector.taught.items()}
    inside = {
        place.at: set(place.mixer.modules()) for place in model.stack.places()
    }  # another mixer may stand around it
    return {at: mean for at, parts in inside.items() for pupil, mean in means.items() if pupil in parts} or None


def shortened(model: nn.Module, collector: Collector, most: float) -> float:
    """Gradients cut to a length, those of lessons for themselves: neither shortens the other. The length of all before."""
    apart = {id(p) for pupil in collector.taught for p in taught_parameters(pupil)}
    groups = [[p for p in model.parameters() if (id(p) in apart) == by_lessons] for by_lessons in (False, True)]
    return math.hypot(*(nn.utils.clip_grad_norm_(group, most).item() for group in groups))


def taught_parameters(mixer: Mixer) -> list[nn.Parameter]:
    """Those of its parts that only choose."""
    return [p for n, p in mixer.named_parameters() if n.partition(".")[0] in mixer.no_gradient]
