"""LFM2: short convolutions, and attention every so often."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slipstream.interop.gguf.architecture import Architecture, Change, There
from slipstream.interop.gguf.short_conv import AROUND, NAMES, of_short_conv, their_short_conv
from slipstream.interop.gguf.state_space import convolution
from slipstream.interop.hf.fields import Fields


class LFM2(Architecture):
    name = "lfm2"
    model_type = "lfm2"
    stem = AROUND
    modules = NAMES
    wide = frozenset({"shortconv.conv"})

    def config(self, said: Fields, there: There) -> dict[str, Any]:
        return of_short_conv(said, there) | {"block_auto_adjust_ff_dim": False}

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return their_short_conv(config)

    def changes(self, config: Mapping[str, Any]) -> dict[str, Change]:
        return {"shortconv.conv": convolution()}
