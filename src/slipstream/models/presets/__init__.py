"""Presets: names for patterns. A preset is its pattern and, where it is public, the sizes of a model that has it; nothing else.

A name alone stands for its pattern at the size that is asked for: `--arch jamba`. Where a mixer has the same name (mamba,
mamba2, rwkv7), the name is the mixer, with a feed-forward behind it as always; the preset then only says what the published
model is. Read without torch.
"""

from __future__ import annotations

from slipstream.core.cards import cards
from slipstream.models.presets.table import PRESETS, Preset, Published

__all__ = ["PRESETS", "Preset", "Published", "expanded"]


def expanded(pattern: str) -> str:
    """The pattern that a preset's name stands for; any other pattern as it is."""
    name = pattern.strip()
    return PRESETS[name].pattern if name in PRESETS and name not in cards() else pattern
