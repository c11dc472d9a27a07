"""Nemotron-H: every layer is Mamba-2, attention without positions, or a feed-forward. It has the first kind where there are no
heads of keys and no width of a feed-forward. The least step size, of which files say nothing, is that of transformers; llama.cpp
has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slipstream.core.errors import InputError
from slipstream.interop.gguf.architecture import Architecture, Change, There, decoder, their_decoder
from slipstream.interop.gguf.hybrid import attention_places, their_places
from slipstream.interop.gguf.state_space import BACKBONE, WIDE, ssd_changes
from slipstream.interop.hf.fields import Fields

NAMES = {
    "norm": "attn_norm",
    "mixer.in_proj": "ssm_in",
    "mixer.conv1d": "ssm_conv1d",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm": "ssm_norm",
    "mixer.out_proj": "ssm_out",
    **{f"mixer.{x}_proj": f"attn_{x}" for x in "qkv"},
    "mixer.o_proj": "attn_output",
    "mixer.up_proj": "ffn_up",
    "mixer.down_proj": "ffn_down",
}
SIZES = {
    "ssm_state_size": "ssm.state_size",
    "conv_kernel": "ssm.conv_kernel",
    "mamba_num_heads": "ssm.time_step_rank",
    "n_groups": "ssm.group_count",
}
WIDTHS, EPS = "feed_forward_length", "attention.layer_norm_epsilon"  # widths: one a layer
LEAST_STEP = 0.001
KINDS = ("linear_attention", "full_attention", "mlp")


class NemotronH(Architecture):
    name = "nemotron_h"
    model_type = "nemotron_h"
    layers = "backbone.layers"
    stem = BACKBONE
    modules = NAMES
    wide = WIDE | {"ssm_norm"}

    def config(self, said: Fields, there: There) -> dict[str, Any]:
        alike, attention = attention_places(said)
        widths = said.wholes(WIDTHS)
        if len(widths) != len(attention) or len(set(widths) - {0}) != 1:
            raise InputError(f"{said.owner}: {WIDTHS} must be zeros, and one number for layers that are a feed-forward")
        alike.table[WIDTHS] = max(widths)
        config, eps = decoder(alike, there), said.number(EPS)
        said.only("rope.scaling.finetuned", False)
        said.ignore("rope.freq_base")
        sizes = {theirs: said.whole(name) for theirs, name in SIZES.items()}
        return {
            **{n: v for n, v in config.items() if n not in ("num_hidden_layers", "rms_norm_eps")},
            **sizes,
            "layers_block_type": [KINDS[2 * bool(width) or here] for width, here in zip(widths, attention)],
            "layer_norm_epsilon": said.number("attention.layer_norm_rms_epsilon", eps),
            "mamba_head_dim": said.whole("ssm.inner_size") // sizes["mamba_num_heads"],
            "mlp_hidden_act": "relu2",
            "time_step_min": LEAST_STEP,
            "use_bias": False,
            "use_conv_bias": any(n.endswith("ssm_conv1d.bias") for n in there.shapes),
            "mlp_bias": any(n.endswith("ffn_up.bias") for n in there.shapes),
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if config["use_bias"] or config["mlp_hidden_act"] != "relu2" or config["time_step_min"] != LEAST_STEP:
            raise InputError(
                f"nemotron_h in GGUF has Mamba-2 without biases on projections, steps of at least {LEAST_STEP} (dt_min), and "
                "relu2 in feed-forwards"
            )
        kinds, eps = config["layers_block_type"], float(config["layer_norm_epsilon"])
        return {
            **their_decoder({**config, "num_hidden_layers": len(kinds), "rms_norm_eps": eps}),
            **their_places([kind == "full_attention" for kind in kinds], config["num_key_value_heads"]),
            **{name: config[theirs] for theirs, name in SIZES.items()},
            WIDTHS: [config["intermediate_size"] * (kind == "mlp") for kind in kinds],
            EPS: eps,
            "ssm.inner_size": config["mamba_num_heads"] * config["mamba_head_dim"],
        }

    def changes(self, config: Mapping[str, Any]) -> dict[str, Change]:
        return ssd_changes(config["n_groups"])
