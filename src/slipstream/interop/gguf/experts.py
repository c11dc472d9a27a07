"""Mixtures of experts in GGUF files: the matrices of all experts of a layer are one tensor, by kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from slipstream.interop.gguf.architecture import There
from slipstream.interop.hf.experts import EXPERT_NAMES, MOST
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.weights import Rule

KINDS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
WIDTH, SHARED_WIDTH = "expert_feed_forward_length", "expert_shared_feed_forward_length"
DENSE, GATING = "leading_dense_block_count", "expert_gating_func"
SOFTMAX, SIGMOID = 1, 2  # the latter's numbers


def experts(theirs: str, count: int, names: tuple[str, ...] = EXPERT_NAMES) -> list[Rule]:
    """theirs: what transformers calls the list of a layer's experts. names: of an expert's gate, up and down projections."""
    return [
        one(f"{kind}.weight", [f"{theirs}.{i}.{name}.weight" for i in range(count)]) for kind, name in zip(KINDS, names)
    ]


def one(tensor: str, slices: list[str]) -> Rule:
    """A tensor of llama.cpp's whose slices are tensors of transformers'."""
    return Rule(
        (tensor,),
        tuple(slices),
        read=lambda tensors: list(tensors[0].unbind(0)),
        write=lambda tensors: [torch.stack(list(tensors))],
    )


def of_mixture(said: Fields, count: str) -> dict[str, Any]:
    """config.json of how many experts there are and how many are used. count: transformers' name of the former."""
    n = said.whole("expert_count", most=MOST)
    return {count: n, "num_experts_per_tok": said.whole("expert_used_count", most=n)}


def their_mixture(config: Mapping[str, Any], count: str) -> dict[str, Any]:
    """The inverse."""
    return {"expert_count": config[count], "expert_used_count": config["num_experts_per_tok"]}


def sparse_places(there: There, n_layers: int) -> list[int]:
    """The layers that have a router."""
    return [i for i in range(n_layers) if f"blk.{i}.ffn_gate_inp.weight" in there.shapes]
