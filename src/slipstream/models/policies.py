"""A trained model run in another way: what its caches keep, and which keys its prompts read. The weights are shared.

    cheaper = with_policies(model, cache="h2o:512", prefill_policy="minference")

The settings go into the pattern of the model's config, so that whatever knows the model by it (checkpoints, saved states)
knows them too. Layers without such a cache, recurrent ones above all, are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from statistics import fmean
from typing import Any, cast

import torch

from slipstream.core.cards import card, cards
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer
from slipstream.models.language_model import LanguageModel
from slipstream.models.pattern import BlockSpec, Part, layers, parse, written
from slipstream.policies.config import PolicyConfig

Policies = str | Sequence[str]  # one for all layers that have such a setting, or one for each of them


def with_policies(
    model: LanguageModel, cache: Policies | None = None, prefill_policy: Policies | None = None
) -> LanguageModel:
    """The model under these policies; what is None stays as it is. Its parameters are the given model's own.

    Raises InputError when no layer has such a setting, or when one cannot be run so.
    """
    pattern = model.config.pattern
    for field, wanted in (("cache", cache), ("prefill_policy", prefill_policy)):
        if wanted is not None:
            pattern = _with_setting(pattern, model.config.n_layers, field, wanted)
    with torch.device("meta"):
        asked = LanguageModel(model.config.model_copy(update={"pattern": pattern}), model.tokenizer)
    same = [*model.parameters(), *model.buffers(), model.tokenizer]
    changed = deepcopy(model, {id(kept): kept for kept in same})
    changed.config = asked.config
    for block, asked_for in zip(changed.stack.blocks, asked.stack.blocks):
        for i, (old, new) in enumerate(zip(block.mixers, asked_for.mixers)):
            if new.config != old.config:
                block.mixers[i] = _with_weights_of(old, new)
    return changed


def _with_weights_of(old: Mixer, new: Mixer) -> Mixer:
    """The new one, in whose modules the parameters of the same modules of the old one stand."""
    for module, source in zip(new.modules(), old.modules(), strict=True):
        for name, tensor in (*source.named_parameters(recurse=False), *source.named_buffers(recurse=False)):
            setattr(module, name, tensor)
    return new.train(old.training)


def keys_read(model: LanguageModel, tokens: int) -> float:
    """Keys that a query head compares with to make one token after so many: the mean over the layers with such a cache."""
    return fmean(cast(Any, mixer).cache.keys_read(tokens) for mixer in cached(model))


def cached(model: LanguageModel) -> list[Mixer]:
    """The mixers whose cache can be run by a policy, in order; each has it as its `cache`."""
    return [mixer for mixer in model.stack.mixers() if "cache" in card(mixer.name).fields]


def _with_setting(pattern: str, n_layers: int, field: str, wanted: Policies) -> str:
    """The pattern with one setting changed; written out to all layers where each has its own."""
    each = not isinstance(wanted, str)
    blocks = layers(pattern, n_layers) if each else parse(pattern)
    takers = sum(field in card(part.name).fields for block in blocks for part in block.parts)
    if not takers:
        able = ", ".join(name for name, c in cards().items() if field in c.fields)
        raise InputError(f"no layer of {pattern!r} has a setting {field}; these mixers have one: {able}")
    if each and len(wanted) != takers:
        raise InputError(f"{len(wanted)} policies are given for {field}, and {takers} layers of {pattern!r} have one")
    values = iter(wanted if each else [wanted] * takers)
    return written([BlockSpec(tuple(_changed(part, field, values) for part in block.parts)) for block in blocks])


def _changed(part: Part, field: str, values: Iterator[Any]) -> Part:
    """What is the default is not written, so that it leaves the pattern as it was."""
    if field not in card(part.name).fields:
        return part
    value, rest = next(values), {k: v for k, v in part.settings.items() if k != field}
    default = PolicyConfig.model_fields[field].default
    return replace(part, settings=rest if value == default else rest | {field: value})
