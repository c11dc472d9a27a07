"""slipstream: every efficient sequence architecture under one contract, on the machine you have.

    import slipstream as ss
    model = ss.language_model("3*gated_deltanet, attention", n_layers=12, d_model=768, vocab_size=256)
    logits, state = model.prefill(tokens)

Names are imported when first used, so that `import slipstream` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "mixer": "slipstream.core.registry",
    "Mixer": "slipstream.core.mixer",
    "MixerConfig": "slipstream.core.config",
    "Slot": "slipstream.core.state",
    "State": "slipstream.core.state",
    "Cost": "slipstream.core.cost",
    "InputError": "slipstream.core.errors",
    "language_model": "slipstream.models.language_model",
    "LanguageModel": "slipstream.models.language_model",
    "load": "slipstream.interop.load",
    "with_policies": "slipstream.models.policies",
    "retrieval_heads": "slipstream.models.retrieval_heads",
    "quantise": "slipstream.convert.quantise",
}
_ROOMS = ("mixers", "generate", "hf")  # packages; the first two are also functions
__all__ = [*_HOMES, *_ROOMS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"slipstream.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'slipstream' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
