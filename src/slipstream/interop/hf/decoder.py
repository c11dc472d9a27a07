"""What most families share: settings of attention, of positions and of the vocabulary, and the names of their tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer
from slipstream.interop.hf.fields import Fields, one_of_each
from slipstream.interop.hf.weights import Rule, in_blocks, rename, renames
from slipstream.layers.rope_scaling import Linear, Llama3, RopeScaling, Yarn, rope_scaling, yarn_magnitude
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel
from slipstream.models.pattern import BlockSpec, Part, period, written

ACTIVATIONS = {  # theirs -> ours; several names are the same there
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
THEIR_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
WINDOWED = {"sliding_attention": "sliding_window", "full_attention": "attention"}


def stem(base: str = "model", embedding: str = "embed_tokens", norm: str = "norm") -> list[Rule]:
    """What stands around the blocks."""
    return [
        rename(f"{base}.{embedding}", "embedding"),
        rename(f"{base}.{norm}", "stack.norm"),
        rename("lm_head", "head.proj"),
    ]


STEM = stem()
ATTENTION = [
    *renames("self_attn", "mixers.0.qkv", "q_proj k_proj v_proj q_norm k_norm"),
    *renames("self_attn", "mixers.0", "o_proj sinks"),
]
GATED_MLP = renames("mlp", "mixers.1", "gate_proj up_proj down_proj")
NORMS = [rename("input_layernorm", "norms.0"), rename("post_attention_layernorm", "norms.1")]

AROUND = [
    rename("input_layernorm", "norms.0"),
    rename("post_attention_layernorm", "out_norms.0"),
    rename("pre_feedforward_layernorm", "norms.1"),
    rename("post_feedforward_layernorm", "out_norms.1"),
]  # the four norms of Gemma


def decoder_rules(model: LanguageModel, block: Iterable[Rule] = (*NORMS, *ATTENTION, *GATED_MLP)) -> list[Rule]:
    """The table of a model whose blocks are all alike."""
    return [*STEM, *in_blocks(block, range(model.config.n_layers))]


def sizes(hf: Fields, tied: bool = False, eps: float = 1e-6, eps_name: str = "rms_norm_eps") -> dict[str, Any]:
    """The fields of ModelConfig that every family has. tied, eps: what it takes when its settings do not say."""
    return {
        "n_layers": hf.whole("num_hidden_layers"),
        "d_model": hf.whole("hidden_size"),
        "vocab_size": hf.whole("vocab_size"),
        "tie_embeddings": hf.flag("tie_word_embeddings", tied),
        "norm_eps": hf.number(eps_name, eps),
        "context": hf.whole("max_position_embeddings", None),
    }


def their_sizes(model: LanguageModel, eps_name: str = "rms_norm_eps") -> dict[str, Any]:
    """The inverse of sizes, with the ids of special tokens."""
    c = model.config
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layers,
        eps_name: c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "max_position_embeddings": c.context or 2048,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **model.conventions.ids(),
    }


def heads(hf: Fields, head_dim: int | None = None) -> dict[str, Any]:
    """Settings of attention's heads. head_dim: what the family takes when its settings do not say; hidden_size / heads."""
    n = hf.whole("num_attention_heads")
    width = hf.whole("head_dim", head_dim) or hf.whole("hidden_size") // n
    if width < 1:
        raise InputError(f"{hf.owner}: hidden_size {hf.whole('hidden_size')} is too narrow for {n} heads")
    return {"n_heads": n, "n_kv_heads": hf.whole("num_key_value_heads", n), "head_dim": width}


def their_heads(mixers: Iterable[Mixer]) -> dict[str, Any]:
    """The inverse, of attention layers that all have the same."""
    qkvs: list[Any] = [mixer.get_submodule("qkv") for mixer in mixers]
    return {
        "num_attention_heads": one_of_each((qkv.n_heads for qkv in qkvs), "n_heads"),
        "num_key_value_heads": one_of_each((qkv.n_kv_heads for qkv in qkvs), "n_kv_heads"),
        "head_dim": one_of_each((qkv.head_dim for qkv in qkvs), "head_dim"),
    }


def gated_mlp(hf: Fields, activation: str = "hidden_act", default: str = "silu", **settings: Any) -> Part:
    """The feed-forward of Llama and most after it. activation: the field's name. settings: further ones of ours."""
    act = ACTIVATIONS[hf.word(activation, ACTIVATIONS, default)]
    act_settings = {} if act == "silu" else {"activation": act}
    return Part("swiglu", {"d_ff": hf.whole("intermediate_size")} | act_settings | settings)


def mlp_bias(hf: Fields) -> dict[str, Any]:
    """mlp_bias: on all projections of a feed-forward."""
    return {"bias": True} if hf.flag("mlp_bias", False) else {}


def their_gated_mlp(mixers: Iterable[Mixer], activation: str = "hidden_act") -> dict[str, Any]:
    """The inverse."""
    mixers = list(mixers)
    widths: list[Any] = [mixer.get_submodule("up_proj") for mixer in mixers]
    act = one_of_each((values(mixer)["activation"] for mixer in mixers), "activation")
    width = one_of_each((up.out_features for up in widths), "d_ff")
    return {"intermediate_size": width, activation: THEIR_ACTIVATIONS[act]}


def rope(
    hf: Fields,
    layer_type: str | None = None,
    base: float = 10000.0,
    partial: float | None = None,
    beside: Iterable[str] = (),
) -> dict[str, Any]:
    """Settings of rotary positions, from rope_parameters (by kind of layer, or one for all), rope_scaling or rope_theta.

    base, partial: what the family takes when its settings do not say; partial None where it turns whole heads alone.
    beside: fields of the table that change nothing in a text.
    """
    table = hf.table_of("rope_scaling") if hf.has("rope_scaling") else hf.table_of("rope_parameters")
    hf.ignore("rope_scaling", "rope_parameters")
    if layer_type and any(isinstance(value, dict) for value in table.table.values()):
        table = table.table_of(layer_type)
    theta = float(table.number("rope_theta", hf.number("rope_theta", base)))
    fraction = table.number("partial_rotary_factor", hf.number("partial_rotary_factor", partial or 1.0))
    if partial is None and fraction != 1:
        raise InputError(f"{table.owner}: partial_rotary_factor {fraction}; models of this family turn whole heads")
    scaling = _scaling(hf, table)
    table.ignore(*beside)
    table.finish()
    if theta <= 0 or not 0 < fraction <= 1:
        raise InputError(f"{table.owner}: rope_theta {theta} and partial_rotary_factor {fraction} cannot be")
    settings = {"rope_base": theta, "rope_scaling": scaling and str(scaling)}
    return settings if fraction == 1 else settings | {"rope_fraction": fraction}


def _scaling(hf: Fields, table: Fields) -> RopeScaling | None:
    kind = table.word("rope_type", ("default", *READERS), table.word("type", ("default", *READERS), "default"))
    return None if kind == "default" else READERS[kind](hf, table)


def _linear(hf: Fields, table: Fields) -> RopeScaling:
    return Linear(factor=table.number("factor"))


def _llama3(hf: Fields, table: Fields) -> RopeScaling:
    return Llama3(
        factor=table.number("factor"),
        low=table.number("low_freq_factor"),
        high=table.number("high_freq_factor"),
        original=_original(hf, table),
    )


def _yarn(hf: Fields, table: Fields) -> RopeScaling:
    """What is said of the factor on q and k in any of three ways is one number here."""
    original = _original(hf, table)
    factor = table.number("factor", None) or hf.whole("max_position_embeddings") / original
    weight, all_weight = table.number("mscale", None), table.number("mscale_all_dim", None)
    m = table.number("attention_factor", None)
    if m is None and weight and all_weight:
        m = yarn_magnitude(factor, weight) / yarn_magnitude(factor, all_weight)
    return Yarn(
        factor=factor,
        original=original,
        beta_fast=table.number("beta_fast", None) or 32.0,
        beta_slow=table.number("beta_slow", None) or 1.0,
        m=m,
        truncate=table.flag("truncate", True),
    )


READERS = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}


def _original(hf: Fields, table: Fields) -> int:
    inner = table.whole("original_max_position_embeddings", None)
    return hf.whole("original_max_position_embeddings", inner or hf.whole("max_position_embeddings", None))


def their_rope(mixers: Iterable[Mixer]) -> dict[str, Any]:
    """rope_parameters of layers that all have the same."""
    mixers = [values(mixer) for mixer in mixers]
    base = one_of_each((m["rope_base"] for m in mixers), "rope_base")
    fraction = one_of_each((m.get("rope_fraction", 1.0) for m in mixers), "rope_fraction")
    scaling = rope_scaling(one_of_each((m["rope_scaling"] for m in mixers), "rope_scaling"))
    if base is None:
        raise InputError("layers without rotary positions (rope_base none): this family has them in every layer")
    said = {"rope_theta": base, **_their_scaling(scaling)}
    return said if fraction == 1 else said | {"partial_rotary_factor": fraction}


def _their_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default"}
    names = {
        "low": "low_freq_factor",
        "high": "high_freq_factor",
        "original": "original_max_position_embeddings",
        "m": "attention_factor",
    }
    said = {names.get(n, n): v for n, v in scaling.model_dump(exclude_none=True).items()}
    if "original_max_position_embeddings" in said:
        said["original_max_position_embeddings"] = int(said["original_max_position_embeddings"])
    return {"rope_type": scaling.kind, **said}


def values(mixer: Mixer) -> dict[str, Any]:
    """All settings of a mixer, defaults included."""
    return mixer.config.model_dump()


def first_mixers(model: LanguageModel) -> Iterator[Mixer]:
    """The mixer over time of every block."""
    for block in model.stack.blocks:
        yield block.mixers[0]


def second_mixers(model: LanguageModel, name: str = "swiglu") -> Iterator[Mixer]:
    """The feed-forward of every block. Raises InputError where it is none, or of another kind."""
    for block in model.stack.blocks:
        if [mixer.name for mixer in block.mixers[1:]] != [name]:
            raise InputError(
                f"every block of this family is a mixer and {name}, not {'/'.join(m.name for m in block.mixers)}"
            )
        yield block.mixers[1]


def attention_layers(model: LanguageModel, *names: str) -> list[Mixer]:
    """The first mixers, which must be of these. Raises InputError where one is another."""
    mixers = list(first_mixers(model))
    if other := [mixer.name for mixer in mixers if mixer.name not in names]:
        raise InputError(f"this family has {' and '.join(names)} layers, not {other[0]}")
    return mixers


def layers_by_name(model: LanguageModel, *names: str) -> dict[str, dict[int, Mixer]]:
    """The first mixer of every block with its block's number, by its name. Raises InputError where it is none of these."""
    found: dict[str, dict[int, Mixer]] = {name: {} for name in names}
    for i, mixer in enumerate(first_mixers(model)):
        if mixer.name not in found:
            raise InputError(f"this family has {' and '.join(names)} layers, not {mixer.name}")
        found[mixer.name][i] = mixer
    if absent := [name for name in names if not found[name]]:
        raise InputError(f"this family has {' and '.join(names)} layers; there is no {absent[0]}")
    return found


def pattern(blocks: Iterable[tuple[Part, ...]]) -> str:
    """The pattern of these blocks, as short as it can be. What is None in a setting and by default is best left out before."""
    return written(period([BlockSpec(tuple(parts)) for parts in blocks]))


def part(name: str, *tables: dict[str, Any], **settings: Any) -> Part:
    """A mixer with these settings, without those that are None."""
    merged = {key: value for table in (*tables, settings) for key, value in table.items() if value is not None}
    return Part(name, merged)


def windows(hf: Fields, kinds: list[str], window: int | None) -> list[tuple[str, dict[str, Any]]]:
    """For every layer the mixer and its window, by kinds of layers in transformers' words."""
    if "sliding_attention" in kinds and window is None:
        raise InputError(f"{hf.owner} has layers of sliding_attention but no sliding_window")
    return [(WINDOWED[kind], {"window": window} if kind == "sliding_attention" else {}) for kind in kinds]


def their_windows(mixers: Iterable[Mixer]) -> dict[str, Any]:
    """layer_types and sliding_window of attention and sliding_window layers."""
    mixers = list(mixers)
    theirs = {ours: kind for kind, ours in WINDOWED.items()}
    found = [values(mixer)["window"] for mixer in mixers if mixer.name == "sliding_window"]
    return {
        "layer_types": [theirs[mixer.name] for mixer in mixers],
        "sliding_window": one_of_each(found, "window") if found else None,
    }


def qk_scale(hf: Fields, head_dim: int) -> float | None:
    """Gemma's scale of logits, query_pre_attn_scalar^-1/2; None where it is that of the heads' width."""
    scalar = hf.number("query_pre_attn_scalar", 256)
    if scalar <= 0:
        raise InputError(f"{hf.owner}: query_pre_attn_scalar {scalar} must be above 0")
    return None if scalar == head_dim else scalar**-0.5


def their_qk_scale(mixers: Iterable[Mixer], head_dim: int) -> int:
    """The inverse; transformers takes whole numbers alone."""
    scale = one_of_each((values(mixer)["qk_scale"] for mixer in mixers), "qk_scale")
    return head_dim if scale is None else round(scale**-2)


def biases(hf: Fields, default: bool = False) -> dict[str, Any]:
    """attention_bias: on all four projections."""
    return {"qkv_bias": True, "o_bias": True} if hf.flag("attention_bias", default) else {}


def their_biases(mixers: Iterable[Mixer]) -> dict[str, Any]:
    return {"attention_bias": one_of_each((values(mixer)["qkv_bias"] for mixer in mixers), "qkv_bias")}


def qwen_windows(hf: Fields, n_layers: int) -> list[tuple[str, dict[str, Any]]]:
    """Qwen's windows: none unless use_sliding_window, and then from layer max_window_layers on, or as layer_types says."""
    window = hf.whole("sliding_window", 4096) if hf.flag("use_sliding_window", False) else None
    first = hf.whole("max_window_layers", 28, least=0)
    hf.ignore("sliding_window")
    by_default = ["sliding_attention" if window and i >= first else "full_attention" for i in range(n_layers)]
    return windows(hf, hf.words("layer_types", WINDOWED, n_layers, by_default), window)


def their_qwen_windows(mixers: Iterable[Mixer]) -> dict[str, Any]:
    said = their_windows(mixers)
    return said | {"use_sliding_window": said["sliding_window"] is not None}


def model_config(pattern: str, *tables: dict[str, Any], **settings: Any) -> ModelConfig:
    """ModelConfig of several tables."""
    return ModelConfig(pattern=pattern, **{k: v for table in (*tables, settings) for k, v in table.items()})
