"""gpt-oss (OpenAI 2025, arXiv:2508.10925): windows in every other layer, sinks, biases everywhere, experts of clamped units.

Only in full precision: the released files are in MXFP4, which is refused as any quantised checkpoint is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slipstream.interop.hf.decoder import (
    ATTENTION,
    NORMS,
    WINDOWED,
    attention_layers,
    biases,
    decoder_rules,
    heads,
    model_config,
    part,
    pattern,
    rope,
    second_mixers,
    sizes,
    their_biases,
    their_heads,
    their_rope,
    their_sizes,
    their_windows,
    values,
    windows,
)
from slipstream.interop.hf.experts import mixture, their_mixture
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields, one_of_each
from slipstream.interop.hf.weights import Rule, changed, rename
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel

BASE = 150000.0  # of rotary positions, where settings do not say


class GptOss(Family):
    model_types = ("gpt_oss",)
    architecture = "GptOssForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about = sizes(hf, eps=1e-5)
        by_default = [("sliding_attention", "full_attention")[i % 2] for i in range(about["n_layers"])]
        kinds = hf.words("layer_types", WINDOWED, about["n_layers"], by_default)
        settings = heads(hf, 64) | rope(hf, base=BASE) | biases(hf, True) | {"sinks": True}
        hf.only("swiglu_alpha", 1.702)
        hf.ignore("experts_per_token", "initial_context_length")  # said a second time
        clamp = hf.number("swiglu_limit", 7.0)
        moe = mixture(hf, "num_local_experts", "intermediate_size", about["n_layers"], bias=True, clamp=clamp)
        layers = windows(hf, kinds, hf.whole("sliding_window", 128))
        return model_config(pattern((part(name, settings, window), moe) for name, window in layers), about)

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        attention = attention_layers(model, "attention", "sliding_window")
        moes = list(second_mixers(model, "moe"))
        return {
            **their_sizes(model),
            **their_heads(attention),
            **their_mixture(moes, "num_local_experts", "intermediate_size"),
            **their_windows(attention),
            **their_biases(attention),
            "rope_parameters": their_rope(attention),
            "swiglu_limit": one_of_each((values(m)["clamp"] for m in moes), "clamp"),
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        theirs, ours = "mlp.experts", "mixers.1.experts"
        experts = [
            changed(f"{theirs}.gate_up_proj", f"{ours}.gate_up_proj", _gates_first, _in_turns),
            changed(f"{theirs}.gate_up_proj_bias", f"{ours}.gate_up_bias", _halves, _turns),
            changed(f"{theirs}.down_proj", f"{ours}.down_proj", _transposed, _transposed),
            rename(f"{theirs}.down_proj_bias", f"{ours}.down_bias"),
        ]
        return decoder_rules(model, [*NORMS, *ATTENTION, rename("mlp.router", "mixers.1.router"), *experts])


def _transposed(t: Tensor) -> Tensor:
    return t.mT


def _gates_first(t: Tensor) -> Tensor:
    """(E D 2F) with gates and ups in turns -> (E 2F D) with all gates first."""
    return _halves(t.mT)


def _in_turns(t: Tensor) -> Tensor:
    return _turns(t).mT


def _halves(t: Tensor) -> Tensor:
    """Along axis 1, even places before odd ones."""
    return torch.cat([t[:, ::2], t[:, 1::2]], 1)


def _turns(t: Tensor) -> Tensor:
    """The inverse."""
    return torch.stack(t.chunk(2, 1), 2).flatten(1, 2)
