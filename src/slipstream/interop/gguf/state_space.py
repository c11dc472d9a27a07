"""What Mamba and Mamba-2 share in GGUF files."""

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
WIDE = frozenset({"ssm_conv1d", "ssm_a", "ssm_d"})  # float32 in every file
NAMES = {"state_size": "ssm.state_size", "conv_kernel": "ssm.conv_kernel", "num_hidden_layers": "block_count"}
RATES = Change(lambda a: (-a).log(), lambda log: -log.exp())


def convolution() -> Change:
    """Without the axis of one channel a filter; its bias is as it is."""
    return Change(lambda t: t[:, None] if t.ndim == 2 else t, lambda t: t.squeeze(1) if t.ndim == 3 else t)


def of_ssm(said: Fields) -> dict[str, Any]:
    """config.json of what both have."""
    width, inner = said.whole("embedding_length"), said.whole("ssm.inner_size")
    if inner % width:
        raise InputError(f"{said.owner}: ssm.inner_size {inner} is no multiple of embedding_length {width}")
    said.ignore("feed_forward_length", "attention.head_count", "context_length")
    return {
        "hidden_size": width,
        "expand": inner // width,
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
