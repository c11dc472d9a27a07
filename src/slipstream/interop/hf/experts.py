"""Mixtures of experts as most families have them: their settings, and their tensors, which are a file's by expert and ours stacked.

ours.experts.gate_up_proj (E 2F D)     each expert's gate_proj above its up_proj
ours.experts.down_proj    (E D F)      each expert's down_proj
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer
from slipstream.interop.hf.decoder import values
from slipstream.interop.hf.fields import Fields, one_of_each
from slipstream.interop.hf.weights import Rule, Tensors, rename, stack
from slipstream.models.language_model import LanguageModel
from slipstream.models.pattern import Part

EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj")
MOST = 1 << 20  # experts of all layers together; the largest models have some 50,000


def mixture(hf: Fields, count: str, width: str, n_layers: int, **settings: Any) -> Part:
    """A moe of one layer. count, width: the fields that say how many experts there are, and how wide each is."""
    n = hf.whole(count)
    if n * n_layers > MOST:
        raise InputError(f"{hf.owner}: {n} experts in each of {n_layers} layers are more than any model has")
    hf.only("hidden_act", "silu", "swish")
    chosen = {"n_experts": n, "top_k": hf.whole("num_experts_per_tok", most=n), "d_expert": hf.whole(width)}
    return Part("moe", chosen | {name: value for name, value in settings.items() if value is not None})


def their_mixture(mixers: Iterable[Mixer], count: str, width: str) -> dict[str, Any]:
    """The inverse, of layers that all have the same."""
    mixers = list(mixers)
    downs: list[Any] = [mixer.get_submodule("experts").get_parameter("down_proj") for mixer in mixers]
    return {
        count: one_of_each((values(mixer)["n_experts"] for mixer in mixers), "n_experts"),
        "num_experts_per_tok": one_of_each((values(mixer)["top_k"] for mixer in mixers), "top_k"),
        width: one_of_each((down.shape[2] for down in downs), "d_expert"),
        "hidden_act": "silu",
    }


def shared_mixture(hf: Fields, n_layers: int, normalised: bool) -> Part:
    """A Qwen's moe: also an expert that every token uses, behind a gate."""
    shared, width = hf.whole("shared_expert_intermediate_size", 512), hf.whole("moe_intermediate_size", 512)
    if shared % width:
        raise InputError(f"{hf.owner}: a shared expert of width {shared} is no whole number of experts of {width}")
    settings = {"normalised": normalised, "n_shared_experts": shared // width, "shared_gate": True}
    return mixture(hf, "num_experts", "moe_intermediate_size", n_layers, **settings)


def their_shared_mixture(mixers: Iterable[Mixer]) -> dict[str, Any]:
    """The inverse."""
    mixers = list(mixers)
    moe = their_mixture(mixers, "num_experts", "moe_intermediate_size")
    shared = one_of_each((values(mixer)["n_shared_experts"] for mixer in mixers), "n_shared_experts")
    return {**moe, "shared_expert_intermediate_size": max(1, shared) * moe["moe_intermediate_size"]}


def shared_mixture_rules(moe: Mixer, stacked: bool = False) -> list[Rule]:
    """Its tensors. stacked: files may have those of all experts as one, as we do."""
    experts = expert_rules("mlp.experts", "mixers.1.experts", values(moe)["n_experts"], EXPERT_NAMES)
    if stacked:
        names = (rule.ours[0].rpartition(".")[2] for rule in experts)
        experts = [replace(r, otherwise=rename(f"mlp.experts.{n}", r.ours[0])) for r, n in zip(experts, names)]
    return [
        *experts,
        rename("mlp.gate", "mixers.1.router"),
        rename("mlp.shared_expert", "mixers.1.shared_experts"),
        rename("mlp.shared_expert_gate", "mixers.1.shared_gate"),
    ]


def sparse_layers(hf: Fields, n_layers: int) -> list[bool]:
    """Which layers of a Qwen have experts: every so many, without those that are named."""
    dense, every = set(hf.wholes("mlp_only_layers", [])), hf.whole("decoder_sparse_step", 1)
    return [i not in dense and (i + 1) % every == 0 for i in range(n_layers)]


def expert_rules(theirs: str, ours: str, count: int, names: tuple[str, str, str]) -> list[Rule]:
    """The tensors of all experts of a layer. names: of an expert's gate, up and down projections."""
    gate, up, down = (f"{theirs}.{{}}.{name}.weight" for name in names)
    return [
        Rule(
            tuple(name.format(i) for i in range(count) for name in (gate, up)),
            (f"{ours}.gate_up_proj",),
            read=_gates_above_ups,
            write=_apart,
        ),
        stack(down, f"{ours}.down_proj", count),
    ]


def _gates_above_ups(tensors: Tensors) -> Tensors:
    return [torch.stack([torch.cat(pair) for pair in zip(tensors[::2], tensors[1::2])])]


def _apart(tensors: Tensors) -> Tensors:
    return [half.contiguous() for expert in tensors[0].unbind(0) for half in expert.chunk(2)]


def their_dense_first(dense: dict[int, Mixer]) -> int:
    """How many layers are dense, which must be the first. Raises InputError when others are."""
    if list(dense) != list(range(len(dense))):
        raise InputError(
            f"dense feed-forwards in layers {', '.join(map(str, dense))}: this family has them in its first layers"
        )
    return len(dense)


def feedforwards(model: LanguageModel, some: bool = True) -> tuple[dict[int, Mixer], dict[int, Mixer]]:
    """The dense feed-forwards and the mixtures, by the numbers of their layers. Raises InputError for others.

    some: there must be a mixture.
    """
    dense, sparse = dict[int, Mixer](), dict[int, Mixer]()
    for i, block in enumerate(model.stack.blocks):
        names = [mixer.name for mixer in block.mixers[1:]]
        if names not in (["swiglu"], ["moe"]):
            raise InputError(f"every block of this family ends with a swiglu or a moe, not {'/'.join(names) or 'none'}")
        (dense if names == ["swiglu"] else sparse)[i] = block.mixers[1]
    if some and not sparse:
        raise InputError("this family has a moe in some layer")
    return dense, sparse
