"""Gemma 3, text. Of its form the file says little: one layer in six without a window, the base of the others, and the largest
model's own scale of logits are known by heart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slipstream.interop.gguf.architecture import (
    AROUND,
    ATTENTION,
    GATED_MLP,
    QK_NORMS,
    Architecture,
    Change,
    There,
    decoder,
    plus_one,
    rope,
    their_decoder,
    their_rope,
)
from slipstream.interop.hf.fields import Fields

GLOBAL_BASE, LOCAL_BASE = 1e6, 1e4
LARGEST = 62  # layers of the 27B, whose logits are scaled by d_model over the heads


class Gemma3(Architecture):
    name = "gemma3"
    model_type = "gemma3_text"
    modules = AROUND | ATTENTION | QK_NORMS | GATED_MLP

    def config(self, said: Fields, there: There) -> dict[str, Any]:
        config = decoder(said, there)
        largest = config["num_hidden_layers"] == LARGEST
        scalar = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
        local = {"rope_type": "default", "rope_theta": said.number("rope.freq_base_swa", LOCAL_BASE)}
        return config | {
            "rope_parameters": {"full_attention": rope(said, GLOBAL_BASE), "sliding_attention": local},
            "sliding_window": said.whole("attention.sliding_window"),
            "sliding_window_pattern": said.whole("attention.sliding_window_pattern", 6),
            "query_pre_attn_scalar": scalar,
            "final_logit_softcapping": said.number("final_logit_softcapping", None),
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        positions, cap = config["rope_parameters"], config["final_logit_softcapping"]
        said = their_decoder(config) | their_rope(
            positions.get("full_attention", {"rope_type": "default", "rope_theta": GLOBAL_BASE})
        )
        said["attention.sliding_window"] = config["sliding_window"]
        if "sliding_attention" in positions:
            said["rope.freq_base_swa"] = float(positions["sliding_attention"]["rope_theta"])
        return said if cap is None else said | {"final_logit_softcapping": cap}

    def changes(self, config: Mapping[str, Any]) -> dict[str, Change]:
        return plus_one("output_norm", "attn_q_norm", "attn_k_norm", *AROUND.values())
