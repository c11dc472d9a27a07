"""Llama 1 to 3 and all in its form (SmolLM, TinyLlama, Mistral without windows). Queries and keys have their rotary pairs side by
side; the scaling of Llama 3.1 is a tensor of factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.interop.gguf.architecture import (
    ATTENTION,
    GATED_MLP,
    NORMS,
    Architecture,
    Change,
    There,
    decoder,
    interleaved,
    rope,
    their_decoder,
    their_rope,
)
from slipstream.interop.hf.fields import Fields
from slipstream.layers.rope_scaling import Llama3, trained_angles

FACTORS = "rope_freqs.weight"
LLAMA31 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Llama(Architecture):
    name = "llama"
    model_type = "llama"
    modules = NORMS | ATTENTION | GATED_MLP

    def reads(self, said: Mapping[str, Any]) -> bool:
        return not said.get("expert_count")

    def config(self, said: Fields, there: There) -> dict[str, Any]:
        said.ignore("expert_count", "expert_used_count")
        config, positions = decoder(said, there), rope(said)
        if FACTORS in there.shapes:
            positions = _of_factors(
                there.get(FACTORS).flatten(), positions["rope_theta"], config["head_dim"], said.owner
            )
        return config | {
            "rope_parameters": positions,
            "attention_bias": "blk.0.attn_q.bias" in there.shapes,
            "mlp_bias": "blk.0.ffn_gate.bias" in there.shapes,
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        positions = config["rope_parameters"]
        plain = positions | {"rope_type": "default"} if positions["rope_type"] == "llama3" else positions
        return their_decoder(config) | their_rope(plain)

    def changes(self, config: Mapping[str, Any]) -> dict[str, Change]:
        return {
            "attn_q": interleaved(config["num_attention_heads"]),
            "attn_k": interleaved(config["num_key_value_heads"]),
        }

    def extra(self, config: Mapping[str, Any]) -> dict[str, Tensor]:
        positions = config["rope_parameters"]
        if positions["rope_type"] != "llama3":
            return {}
        return {FACTORS: _factors(positions["factor"], positions["rope_theta"], config["head_dim"])}


def _factors(factor: float, base: float, width: int) -> Tensor:
    """By how much Llama 3.1 divides every angle."""
    scaled = Llama3(factor=factor, low=1, high=4, original=8192).angles(base, width)
    return torch.tensor([f / s for f, s in zip(trained_angles(base, width), scaled)])


def _of_factors(factors: Tensor, base: float, width: int, owner: str) -> dict[str, Any]:
    """rope_parameters. Raises InputError for factors that are not Llama 3.1's: LongRoPE's are chosen otherwise."""
    factor = round(float(factors.max()), 4)
    if len(factors) * 2 != width or factor < 1 or not factors.allclose(_factors(factor, base, width), rtol=1e-4):
        raise InputError(f"{owner}: {FACTORS} are not those of Llama 3.1's positions, which alone are read here")
    return {"rope_type": "llama3", "rope_theta": base, "factor": factor, **LLAMA31}
