"""Models in which most layers are Gated DeltaNet and every fourth is softmax attention: settings and tensors that they share.

Files of Qwen3.5 also have a network for images, and layers that predict several tokens at once: both are left unread. Rotary
positions of text are the same along all three axes that images have, so that their interleaving changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from slipstream.core.mixer import Mixer
from slipstream.interop.hf.decoder import heads, part, rope, their_heads, their_rope, values
from slipstream.interop.hf.fields import Fields, one_of_each
from slipstream.interop.hf.weights import Rule, Tensors, cut, rename
from slipstream.models.config import ModelConfig
from slipstream.models.pattern import Part

KINDS = ("linear_attention", "full_attention")
AXES = ("mrope_section", "mrope_interleaved")  # positions of images along three axes, which are one in a text


def layer_kinds(hf: Fields, n_layers: int) -> list[str]:
    """In transformers' words; every fourth is full attention where settings do not say."""
    every = hf.whole("full_attention_interval", 4)
    by_default = [KINDS[(i + 1) % every == 0] for i in range(n_layers)]
    return hf.words("layer_types", KINDS, n_layers, by_default)


def their_layer_kinds(layers: dict[str, dict[int, Mixer]], linear: str) -> list[str]:
    """linear: the name of the mixer that is no full attention."""
    count = sum(map(len, layers.values()))
    return [KINDS[i not in layers[linear]] for i in range(count)]


def delta(
    hf: Fields, norm_eps: float, n_heads: int = 16, n_v_heads: int = 32, widths: tuple[int, int] = (128, 128)
) -> Part:
    """A Gated DeltaNet layer. The numbers are what the family takes when its settings do not say."""
    n_heads, n_v_heads = hf.whole("linear_num_key_heads", n_heads), hf.whole("linear_num_value_heads", n_v_heads)
    k, v = hf.whole("linear_key_head_dim", widths[0]), hf.whole("linear_value_head_dim", widths[1])
    return part(
        "gated_deltanet",
        n_heads=n_heads,
        n_v_heads=None if n_v_heads == n_heads else n_v_heads,
        head_dim=k,
        expand_v=None if v == k else v / k,
        conv_size=hf.whole("linear_conv_kernel_dim", 4),
        norm_eps=norm_eps,
    )


def their_delta(mixers: Iterable[Mixer]) -> dict[str, Any]:
    """The inverse, of layers that all have the same."""
    sizes = [_sizes(mixer) for mixer in mixers]
    names = (
        "linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim"
    )
    return {name: one_of_each((s[i] for s in sizes), name) for i, name in enumerate(names.split())}


def _sizes(mixer: Any) -> tuple[int, int, int, int, int]:
    return mixer.n_heads, mixer.n_v_heads, mixer.head_dim, mixer.v_head_dim, mixer.config.conv_size


def delta_rules(mixer: Any) -> list[Rule]:
    """Those tensors of a layer that Qwen3-Next and Qwen3.5 name alike."""
    k, v = mixer.n_heads * mixer.head_dim, mixer.n_v_heads * mixer.v_head_dim
    return [
        cut("linear_attn.conv1d", [f"mixers.0.{n}_conv1d" for n in "qkv"], (k, k, v)),
        *(rename(f"linear_attn.{n}", f"mixers.0.{n}") for n in ("A_log", "dt_bias")),
        rename("linear_attn.norm", "mixers.0.o_norm"),
        rename("linear_attn.out_proj", "mixers.0.o_proj"),
    ]


def apart_delta_rules(mixer: Any) -> list[Rule]:
    """All tensors of a layer of Qwen3.5, whose projections stand apart."""
    k, v = mixer.n_heads * mixer.head_dim, mixer.n_v_heads * mixer.v_head_dim
    return [
        cut("linear_attn.in_proj_qkv", [f"mixers.0.{n}_proj" for n in "qkv"], (k, k, v)),
        rename("linear_attn.in_proj_z", "mixers.0.g_proj"),
        *(rename(f"linear_attn.in_proj_{n}", f"mixers.0.{n}_proj") for n in "ab"),
        *delta_rules(mixer),
    ]


def of_text(hf: Fields, read: Callable[[Fields], ModelConfig]) -> ModelConfig:
    """The text's settings, which stand in a table of their own beside those of a network for images, or are all there is."""
    text = hf.table_of("text_config") if hf.has("text_config") else hf
    text.ignore("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype")
    if text is hf:
        return read(hf)
    text.table.setdefault("tie_word_embeddings", hf.flag("tie_word_embeddings", False))
    hf.ignore(*(name for name in hf.table if name.startswith(("vision_", "image_", "video_", "language_model_"))))
    config = read(text)
    text.finish()
    return config


def text_name(name: str) -> str:
    """Beside a network for images, the text's tensors stand one deeper."""
    return name.replace("model.language_model.", "model.", 1)


def is_no_text(name: str) -> bool:
    return name.startswith(("mtp.", "model.visual."))


def gated_attention(hf: Fields, norm_eps: float) -> Part:
    """Softmax attention with norms of queries and keys and an output gate, which turns a quarter of each head."""
    norms = {"qk_norm": "plus_one", "qk_norm_eps": norm_eps, "gated": True}
    hf.only("attention_bias", False)
    return part("attention", heads(hf, 256), rope(hf, partial=0.25, beside=AXES), norms)


def their_gated_attention(mixers: Iterable[Mixer]) -> dict[str, Any]:
    mixers = list(mixers)
    turned = {"partial_rotary_factor": values(mixers[0])["rope_fraction"]}  # said even where it is all: 0.25 is theirs
    return {**their_heads(mixers), "rope_parameters": their_rope(mixers) | turned, "attention_bias": False}


def gated_attention_rules(mixer: Any) -> list[Rule]:
    """Queries and gates stand side by side in each head."""
    qkv = mixer.qkv
    return [
        by_head(
            "self_attn.q_proj", ("mixers.0.qkv.q_proj", "mixers.0.g_proj"), qkv.n_heads, (qkv.head_dim, qkv.head_dim)
        ),
        *(rename(f"self_attn.{n}", f"mixers.0.qkv.{n}") for n in ("k_proj", "v_proj", "q_norm", "k_norm")),
        rename("self_attn.o_proj", "mixers.0.o_proj"),
    ]


def by_head(theirs: str, ours: Iterable[str], n_heads: int, sizes: Iterable[int]) -> Rule:
    """One of theirs is several of ours, which take turns in it: so many rows of each for one head, then for the next."""
    ours, sizes = tuple(ours), list(sizes)

    def read(tensors: Tensors) -> Tensors:
        parts = tensors[0].unflatten(0, (n_heads, -1)).split(sizes, 1)
        return [t.flatten(0, 1).contiguous() for t in parts]

    def write(tensors: Tensors) -> Tensors:
        return [torch.cat([t.unflatten(0, (n_heads, -1)) for t in tensors], 1).flatten(0, 1)]

    return Rule((theirs,), ours, read, write)
