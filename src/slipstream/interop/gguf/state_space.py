"""What models with Mamba or Mamba-2 share in GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slipstream.core.errors import InputError
from slipstream.interop.gguf.architecture import Change
from slipstream.interop.hf.fields import Fields

BACKBONE = {"backbone.embeddings": "token_embd", "backbone.norm_f": "output_norm", "lm_head": "output"}
SSM = {
    "norm": "attn_norm",
    "mixer.in_proj": "ssm_in",
    "mixer.conv1d": "ssm_conv1d",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.out_proj": "ssm_out",
}
MAMBA2 = {
    "mamba.in_proj": "ssm_in",
    "mamba.conv1d": "ssm_conv1d",
    "mamba.dt_bias": "ssm_dt.bias",
    "mamba.A_log": "ssm_a",
    "mamba.D": "ssm_d",
    "mamba.norm": "ssm_norm",
    "mamba.out_proj": "ssm_out",
}  # in a hybrid
SSD_SIZES = {
    "mamba_d_state": "ssm.state_size",
    "mamba_d_conv": "ssm.conv_kernel",
    "mamba_n_heads": "ssm.time_step_rank",
    "mamba_n_groups": "ssm.group_count",
}
WIDE = frozenset({"ssm_conv1d", "ssm_a", "ssm_d"})  # float32 in every file
NAMES = {"state_size": "ssm.state_size", "conv_kernel": "ssm.conv_kernel", "num_hidden_layers": "block_count"}
RATES = Change(lambda a: (-a).log(), lambda log: -log.exp())


def convolution() -> Change:
    """Without the axis of one channel a filter; its bias is as it is."""
    return Change(lambda t: t[:, None] if t.ndim == 2 else t, lambda t: t.squeeze(1) if t.ndim == 3 else t)


def ssd_changes(n_groups: int) -> dict[str, Change]:
    """Of Mamba-2: rates and skips have an axis of one more, norms one of groups."""
    column = Change(lambda t: t.flatten(), lambda t: t[:, None])
    groups = Change(lambda t: t.flatten(), lambda t: t.unflatten(0, (n_groups, -1)))
    rates = Change(lambda t: RATES.read(t.flatten()), lambda t: RATES.write(t)[:, None])
    return {"ssm_conv1d": convolution(), "ssm_a": rates, "ssm_d": column, "ssm_norm": groups}


def expansion(said: Fields) -> int:
    """How many times as wide as the model its state-space layers are."""
    width, inner = said.whole("embedding_length"), said.whole("ssm.inner_size")
    if inner % width:
        raise InputError(f"{said.owner}: ssm.inner_size {inner} is no multiple of embedding_length {width}")
    return inner // width


def of_ssm(said: Fields) -> dict[str, Any]:
    """config.json of what both have."""
    said.ignore("feed_forward_length", "attention.head_count", "context_length")
    return {
        "hidden_size": said.whole("embedding_length"),
        "expand": expansion(said),
        "layer_norm_epsilon": said.number("attention.layer_norm_rms_epsilon"),
        "use_bias": False,
        "use_conv_bias": True,
        "max_position_embeddings": said.whole("context_length", None),
        **{theirs: said.whole(name) for theirs, name in NAMES.items()},
    }


def their_ssm(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse. llama.cpp asks for the numbers of attention and feed-forward too."""
    return {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "ssm.inner_size": int(config["expand"] * config["hidden_size"]),
        "attention.layer_norm_rms_epsilon": float(config["layer_norm_epsilon"]),
        **{name: config[theirs] for theirs, name in NAMES.items()},
    }
