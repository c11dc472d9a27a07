"""Mamba and Mamba-2 layers as families have them: the same settings under several names."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from slipstream.core.mixer import Mixer
from slipstream.interop.hf.decoder import values
from slipstream.interop.hf.fields import Fields, one_of_each

Names = dict[str, str]  # ours -> theirs
RUN_AND_TRAINED_NAMES = (  # how transformers runs it, and how it was started
    """
    use_mambapy use_associative_scan use_mamba_kernels num_logits_to_keep residual_in_fp32 rescale_prenorm_residual time_step_scale
    time_step_min time_step_max time_step_init_scheme time_step_floor
    """
)
RUN_AND_TRAINED = RUN_AND_TRAINED_NAMES.split()

MAMBA = {
    "expand": "expand",
    "d_state": "state_size",
    "conv_size": "conv_kernel",
    "dt_rank": "time_step_rank",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
}
JAMBA = {
    "expand": "mamba_expand",
    "d_state": "mamba_d_state",
    "conv_size": "mamba_d_conv",
    "dt_rank": "mamba_dt_rank",
    "bias": "mamba_proj_bias",
    "conv_bias": "mamba_conv_bias",
}
BAMBA = {
    "expand": "mamba_expand",
    "n_heads": "mamba_n_heads",
    "head_dim": "mamba_d_head",
    "n_groups": "mamba_n_groups",
    "d_state": "mamba_d_state",
    "conv_size": "mamba_d_conv",
    "bias": "mamba_proj_bias",
    "conv_bias": "mamba_conv_bias",
}


def selective(hf: Fields, names: Names) -> dict[str, Any]:
    """Settings of Mamba layers."""
    by_default = math.ceil(hf.whole("hidden_size") / 16)
    hf.only("hidden_act", "silu", "swish")
    return {
        "expand": hf.whole(names["expand"], 2),
        "d_state": hf.whole(names["d_state"], 16),
        "conv_size": hf.whole(names["conv_size"], 4),
        "dt_rank": whole_or_auto(hf, names["dt_rank"], by_default),
        **flags(hf, names),
    }


def their_selective(mixers: Iterable[Mixer], names: Names) -> dict[str, Any]:
    """The inverse, of layers that all have the same."""
    mixers = list(mixers)
    ranks: list[Any] = [mixer.get_submodule("dt_proj") for mixer in mixers]
    return _same(mixers, names, "expand d_state conv_size bias conv_bias") | {
        names["dt_rank"]: one_of_each((rank.in_features for rank in ranks), "dt_rank"),
        "hidden_act": "silu",
    }


def ssd(hf: Fields, names: Names, **by_default: int) -> dict[str, Any]:
    """Settings of Mamba-2 layers. by_default: of n_heads, n_groups, d_state, conv_size, where theirs do not say."""
    d_model, n_heads = hf.whole("hidden_size"), hf.whole(names["n_heads"], by_default["n_heads"])
    by_expand = hf.whole(names["expand"], 2) * d_model
    inner = n_heads * whole_or_auto(hf, names["head_dim"], by_expand // n_heads)
    return {
        **inner_width(inner, d_model),
        "n_heads": n_heads,
        **{n: hf.whole(names[n], by_default[n]) for n in ("n_groups", "d_state", "conv_size")},
        **flags(hf, names),
        **time_limits(hf),
    }


def their_ssd(mixers: Iterable[Mixer], names: Names) -> dict[str, Any]:
    """The inverse."""
    mixers = list(mixers)
    n_heads = one_of_each((len(mixer.get_parameter("D")) for mixer in mixers), "n_heads")
    inner = one_of_each((values(m)["d_inner"] or values(m)["expand"] * m.config.d_model for m in mixers), "d_inner")
    return {
        **_same(mixers, names, "n_groups d_state conv_size bias conv_bias"),
        names["n_heads"]: n_heads,
        names["head_dim"]: inner // n_heads,
        names["expand"]: max(1, inner // mixers[0].config.d_model),
        **their_time_limits(mixers),
    }


def _same(mixers: list[Mixer], names: Names, which: str) -> dict[str, Any]:
    return {names[n]: one_of_each((values(m)[n] for m in mixers), n) for n in which.split()}


def inner_width(inner: int, d_model: int) -> dict[str, int]:
    """As a multiple of d_model where it is one."""
    return {"d_inner": inner} if inner % d_model else {"expand": inner // d_model}


def whole_or_auto(hf: Fields, name: str, auto: int) -> int:
    """A width that may be left to transformers."""
    if hf.table.get(name) == "auto":
        hf.ignore(name)
        return auto
    return hf.whole(name, auto)


def flags(hf: Fields, names: Names) -> dict[str, bool]:
    """Biases of the projections, and of the convolution."""
    return {"bias": hf.flag(names["bias"], False), "conv_bias": hf.flag(names["conv_bias"], True)}


def time_limits(hf: Fields) -> dict[str, float | None]:
    """Bounds of the step size, which is free by default."""
    least, most = hf.numbers("time_step_limit", 2, [0.0, math.inf])
    return {"dt_min": least or None, "dt_max": None if most == math.inf else most}


def their_time_limits(mixers: Iterable[Mixer]) -> dict[str, Any]:
    """The inverse; nothing where there are none."""
    least, most = one_of_each(((values(m)["dt_min"], values(m)["dt_max"]) for m in mixers), "dt_min and dt_max")
    if not least and most is None:
        return {}
    return {"time_step_limit": [least, {"__float__": "Infinity"} if most is None else most]}
