"""From a name to the live class: only the file asked for is imported."""

from __future__ import annotations

import importlib
from typing import Any

from slipstream.core.cards import card, cards
from slipstream.core.errors import InputError, nearest
from slipstream.core.mixer import Mixer


def mixer_class(name: str) -> type[Mixer]:
    """The class registered under `name`. Raises InputError with the nearest names."""
    if name not in Mixer.registry:
        importlib.import_module(card(name).module)
    return Mixer.registry[name]


def mixers() -> dict[str, type[Mixer]]:
    """Every mixer: name -> class."""
    return {name: mixer_class(name) for name in cards()}


def mixer(name: str, **settings: Any) -> Mixer:
    """A mixer by name: mixer("gated_deltanet", d_model=64, n_heads=4)."""
    return build(name, settings)


def build(name: str, settings: dict[str, Any]) -> Mixer:
    """Like mixer, with the settings as a table. Raises InputError for an unknown name or field."""
    known = card(name).fields
    if unknown := [s for s in settings if s not in known]:
        raise InputError(f"{name} has no setting {unknown[0]!r}; {nearest(unknown[0], known)}")
    cls = mixer_class(name)
    return cls(cls.Config(**settings))
