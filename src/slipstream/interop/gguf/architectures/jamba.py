"""Jamba: mostly Mamba with norms inside, every so often attention without positions, or experts whose weights do not sum to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slipstream.core.errors import InputError
from slipstream.interop.gguf.architecture import (
    ATTENTION,
    Architecture,
    Change,
    There,
    decoder,
    their_decoder,
)
from slipstream.interop.gguf.experts import experts, of_mixture, sparse_places, their_mixture
from slipstream.interop.gguf.hybrid import attention_places, their_places
from slipstream.interop.gguf.state_space import RATES, WIDE, convolution, expansion
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.weights import Rule

STEM = {"model.embed_tokens": "token_embd", "model.final_layernorm": "output_norm", "lm_head": "output"}
MAMBA = {
    "mamba.in_proj": "ssm_in",
    "mamba.conv1d": "ssm_conv1d",
    "mamba.x_proj": "ssm_x",
    "mamba.dt_proj": "ssm_dt",
    "mamba.A_log": "ssm_a",
    "mamba.D": "ssm_d",
    "mamba.out_proj": "ssm_out",
    **{f"mamba.{x}_layernorm": f"ssm_{x}_norm" for x in ("dt", "b", "c")},
}
MLP = {f"feed_forward.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
SIZES = {
    "mamba_d_state": "ssm.state_size",
    "mamba_d_conv": "ssm.conv_kernel",
    "mamba_dt_rank": "ssm.time_step_rank",
}


class Jamba(Architecture):
    name = "jamba"
    model_type = "jamba"
    stem = STEM
    modules = {
        "input_layernorm": "attn_norm",
        "pre_ff_layernorm": "ffn_norm",
        "feed_forward.router": "ffn_gate_inp",
        **ATTENTION,
        **MAMBA,
        **MLP,
    }
    wide = WIDE

    def config(self, said: Fields, there: There) -> dict[str, Any]:
        alike, attention = attention_places(said)
        config = decoder(alike, there)
        n = config["num_hidden_layers"]
        sparse = sparse_places(there, n)
        return {
            **config,
            **(of_mixture(said, "num_experts") if sparse else self._dense(said)),
            **_every([i for i in range(n) if attention[i]], "attn_layer", n, said.owner),
            **_every(sparse or range(n), "expert_layer", n, said.owner),
            **{theirs: said.whole(name) for theirs, name in SIZES.items()},
            "mamba_expand": expansion(said),
            "mamba_proj_bias": False,
            "mamba_conv_bias": True,
        }

    @staticmethod
    def _dense(said: Fields) -> dict[str, int]:
        said.ignore("expert_count", "expert_used_count")
        return {"num_experts": 1, "num_experts_per_tok": 1}

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if config["mamba_expand"] != 2 or config["mamba_proj_bias"] or not config["mamba_conv_bias"]:
            raise InputError(
                "jamba in llama.cpp has Mamba of twice the width, a bias on its convolution, and on no projection"
            )
        n = config["num_hidden_layers"]
        places = range(config["attn_layer_offset"], n, config["attn_layer_period"])
        return {
            **their_decoder(config),
            **their_places([i in places for i in range(n)], config["num_key_value_heads"]),
            **(their_mixture(config, "num_experts") if config["num_experts"] > 1 else {}),
            **{name: config[theirs] for theirs, name in SIZES.items()},
            "ssm.inner_size": config["mamba_expand"] * config["hidden_size"],
        }

    def changes(self, config: Mapping[str, Any]) -> dict[str, Change]:
        return {"ssm_conv1d": convolution(), "ssm_a": RATES}

    def regrouped(self, config: Mapping[str, Any]) -> list[Rule]:
        return experts("feed_forward.experts", config["num_experts"])


def _every(layers: Sequence[int], kind: str, n_layers: int, owner: str) -> dict[str, int]:
    """The period and the first of the layers of a kind. Raises InputError when others are between."""
    first, second = [*layers, n_layers + layers[0]][:2]
    if list(layers) != list(range(first, n_layers, second - first)):
        raise InputError(f"{owner}: layers {', '.join(map(str, layers))} of one kind are not every {second - first}th")
    return {f"{kind}_period": second - first, f"{kind}_offset": first}
