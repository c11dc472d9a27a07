"""An architecture of llama.cpp: what its settings and its tensors are in transformers' words, and back.

Each file in architectures/ has one. transformers' words are what the families of interop/hf read, so that a model that came as
GGUF and one that came as a Hugging Face folder are the same from there on.

Adding one is one file there, and one line in tests/interop/test_gguf.py: a class of Architecture with `name`
(general.architecture), the `model_type` of the family, `config` and `settings`, which translate settings both ways (`decoder` and
`their_decoder` are what most share), the names of `modules` in a layer, `changes` for tensors that are kept in another form, and
`regrouped` for those of which several are one there, or one is several.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from slipstream.core.errors import InputError, nearest
from slipstream.core.packages import import_all
from slipstream.interop.gguf import architectures
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.weights import Rule, changed, rename

STEM = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
ATTENTION = {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {"self_attn.o_proj": "attn_output"}
QK_NORMS = {f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"}
GATED_MLP = {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
AROUND = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # the four norms of Gemma


class There(NamedTuple):
    """The tensors of a file: their shapes, and one of them."""

    shapes: Mapping[str, tuple[int, ...]]
    get: Callable[[str], Tensor]


class Change(NamedTuple):
    """A tensor that is kept in another form. read makes transformers' of llama.cpp's, write undoes it."""

    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor], Tensor]


class Architecture(ABC):
    """Abstract. name: general.architecture. model_type: of the family. modules, stem: transformers' names to llama.cpp's.

    label: what it is called here, where one name of llama.cpp's is of several families; then `reads` tells them apart.
    """

    name: ClassVar[str]
    label: ClassVar[str] = ""
    model_type: ClassVar[str]
    modules: ClassVar[dict[str, str]]
    stem: ClassVar[dict[str, str]] = STEM
    layers: ClassVar[str] = "model.layers"  # transformers' name of the list of them
    wide: ClassVar[frozenset[str]] = frozenset()  # modules, besides vectors, that are always float32
    found: ClassVar[dict[str, Architecture]] = {}

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        Architecture.found[cls.label or cls.name] = cls()

    def reads(self, said: Mapping[str, Any]) -> bool:
        """Whether a file of this name, with these settings, is of this family."""
        return True

    @abstractmethod
    def config(self, said: Fields, there: There) -> dict[str, Any]:
        """What config.json would be. Every setting that changes what is computed must be asked for."""

    @abstractmethod
    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse, without the architecture's name before each. Raises InputError for what it cannot say."""

    def baked(self, config: dict[str, Any]) -> dict[str, Any]:
        """The same settings without those that are in the weights of a file instead."""
        return config

    def changes(self, config: Mapping[str, Any]) -> dict[str, Change]:
        """By llama.cpp's name of a module without its block, such as attn_q."""
        return {}

    def regrouped(self, config: Mapping[str, Any]) -> list[Rule]:
        """theirs: tensors of llama.cpp's in a block, ours: of transformers' in a layer. Used where a layer has them."""
        return []

    def extra(self, config: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tensors of a file that are settings, such as the factors of rotary positions."""
        return {}

    def tensor(self, name: str) -> str:
        """llama.cpp's name of one of transformers' tensors. Raises InputError when it has none."""
        path, _, leaf = name.rpartition(".")
        if found := re.fullmatch(rf"{re.escape(self.layers)}\.(\d+)\.(.+)", path):
            names, before, path = self.modules, f"blk.{found[1]}.", found[2]
        else:
            names, before = self.stem, ""
        if f"{path}.{leaf}" in names:  # no weight or bias of a module, but a tensor of its own
            return before + names[f"{path}.{leaf}"]
        if path not in names:
            raise InputError(f"{self.name} in llama.cpp has no tensor for {name}")
        return f"{before}{names[path]}.{leaf}"

    def renamed(self, name: str, config: Mapping[str, Any]) -> Rule:
        """One of transformers' tensors that is one of llama.cpp's. Raises InputError when it is none."""
        theirs = self.tensor(name)
        change = self.changes(config).get(_module(theirs))
        return rename(theirs, name) if change is None else changed(theirs, name, change.read, change.write)

    def translation(self, names: Iterable[str], config: Mapping[str, Any]) -> list[Rule]:
        """Rules that have all of transformers' tensors of these names, each in one."""
        names = dict.fromkeys(names)
        numbers = dict.fromkeys(m[1] for m in map(re.compile(rf"{re.escape(self.layers)}\.(\d+)\.").match, names) if m)
        rules = [rule.inside(f"blk.{i}", f"{self.layers}.{i}") for i in numbers for rule in self.regrouped(config)]
        grouped = {name: rule for rule in rules if names.keys() >= set(rule.ours) for name in rule.ours}
        found = [grouped.get(name) or self.renamed(name, config) for name in names]
        return list({rule.theirs: rule for rule in found}.values())

    def is_wide(self, name: str) -> bool:
        return _module(name) in self.wide


def _module(name: str) -> str:
    """Without its block, and without weight or bias."""
    return re.sub(r"^blk\.\d+\.|\.(weight|bias)$", "", name)


@cache
def all_architectures() -> dict[str, Architecture]:
    """Every one: general.architecture -> Architecture."""
    import_all(architectures)
    return dict(sorted(Architecture.found.items()))


def architecture(label: Any) -> Architecture:
    """The one that is called so here. Raises InputError with the nearest."""
    if not isinstance(label, str) or label not in all_architectures():
        raise InputError(
            f"no architecture of GGUF files that slipstream reads is called {label!r:.60}; "
            f"{nearest(str(label), all_architectures())}"
        )
    return all_architectures()[label]


def architecture_of(settings: Mapping[str, Any]) -> Architecture:
    """That of a file. Raises InputError for one that is not known."""
    name = settings.get("general.architecture")
    named = [a for a in all_architectures().values() if isinstance(name, str) and a.name == name]
    if not named:
        return architecture(name)
    said = own_settings(settings, named[0].name)
    return next((a for a in named if a.reads(said)), named[0])


def own_settings(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Those of the architecture of this name, without it before each."""
    own = {n.removeprefix(f"{name}."): value for n, value in settings.items() if n.startswith(f"{name}.")}
    return {n: value.tolist() if isinstance(value, np.ndarray) else value for n, value in own.items()}


def vocabulary_of(said: Fields, there: There) -> dict[str, Any]:
    """What the embeddings say."""
    if len(there.shapes.get("token_embd.weight", ())) != 2:
        raise InputError(f"{said.owner} has no matrix token_embd.weight; download it again")
    vocab_size = there.shapes["token_embd.weight"][0]
    said.only("vocab_size", vocab_size)
    return {"vocab_size": vocab_size, "tie_word_embeddings": "output.weight" not in there.shapes}


def decoder(said: Fields, there: There) -> dict[str, Any]:
    """config.json of what all decoders have."""
    n_heads, width = said.whole("attention.head_count"), said.whole("embedding_length")
    head_dim = said.whole("attention.key_length", width // n_heads)
    said.only("attention.value_length", head_dim)
    said.only("rope.dimension_count", head_dim)
    said.ignore("context_length", "rope.scaling.finetuned", "rope.scaling.original_context_length")
    return {
        **vocabulary_of(said, there),
        "hidden_size": width,
        "intermediate_size": said.whole("feed_forward_length"),
        "num_hidden_layers": said.whole("block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": said.whole("attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "rms_norm_eps": said.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": said.whole("context_length", None),
    }


def their_decoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse."""
    return {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": config["head_dim"],
    }


def plus_one(*modules: str) -> dict[str, Change]:
    """Norms whose files have one more than the checkpoints. What is read is written again bit by bit; a weight of ours loses
    what its sum with one has no digits for, which is what the norm computes with in any case."""
    change = Change(lambda t: t - 1, lambda t: 1 + t)
    return dict.fromkeys(modules, change)


def interleaved(n_heads: int) -> Change:
    """Rows of queries or keys whose rotary pairs lie side by side there, and half a head apart with transformers."""

    def apart(t: Tensor) -> Tensor:
        return t.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def together(t: Tensor) -> Tensor:
        return t.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    return Change(apart, together)


def rope(said: Fields, base: float = 10000.0) -> dict[str, Any]:
    """rope_parameters of settings that may have linear or yarn scaling."""
    found = {"rope_theta": said.number("rope.freq_base", base)}
    kind = said.word("rope.scaling.type", ("none", "linear", "yarn"), "none")
    factor = said.number("rope.scaling.factor", said.number("rope.scale_linear", 1.0))
    if kind == "yarn":
        original = said.whole("rope.scaling.original_context_length")
        return found | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    if factor not in (0, 1):
        return found | {"rope_type": "linear", "factor": factor}
    return found | {"rope_type": "default"}


def their_rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse, as well as it can be said: what is written is read back."""
    kind = parameters["rope_type"]
    said: dict[str, Any] = {"rope.freq_base": float(parameters["rope_theta"])}
    if kind == "default":
        return said
    if kind not in ("linear", "yarn"):
        raise InputError(f"rotary positions scaled by {kind} cannot be said in this architecture of llama.cpp")
    said |= {"rope.scaling.type": kind, "rope.scaling.factor": float(parameters["factor"])}
    if kind == "yarn":
        said["rope.scaling.original_context_length"] = parameters["original_max_position_embeddings"]
    return said
