"""RWKV-7 models as their author publishes them: one .pth file of tensors, whose shapes say all there is to say.

A pickle is read as weights alone: no code in it runs. The vocabulary (RWKV World) is not in the file: a model takes and gives
token ids. Not older versions, and not models with DeepEmbed.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.interop.dtypes import dtype_named
from slipstream.interop.hf.decoder import model_config, part, pattern
from slipstream.interop.hf.read import Filling, without_storage
from slipstream.interop.hf.stored import Checkpoint, Pickled
from slipstream.interop.hf.weights import Rule, changed, in_blocks, rename
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel

BLOCK = re.compile(r"blocks\.(\d{1,6})\.")
HEAD_EPS = 64e-5  # of the group norm over heads, whatever their width
UNREAD = tuple(f"blocks.0.att.v{n}" for n in "012")  # some files have them, but a first layer has nothing to mix
PROJECTIONS = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj", "ln_x": "g_norm"}


def load_rwkv7(path: Path, dtype: torch.dtype | str | None = None) -> LanguageModel:
    """The model in a file. dtype: of all its numbers; as they are stored when None.

    Raises InputError when it holds another model, or is damaged.
    """
    file = Pickled(path)
    names = file.names()
    config = _config(file, path)
    model = without_storage(config, len(names), str(path))
    filling = Filling(model, Checkpoint(dict.fromkeys(names, file)), path, "the rest of it")
    filling.fill(_rules(config), None if dtype is None else dtype_named(dtype), UNREAD.__contains__)
    return model.eval()


def _config(file: Pickled, path: Path) -> ModelConfig:
    """Settings from shapes."""

    def shape(name: str) -> tuple[int, int]:
        if name not in file.tensors or file.tensors[name].ndim != 2 or not file.tensors[name].numel():
            raise InputError(
                f"{path} is no RWKV-7 model: it has no matrix {name}. Of .pth files, slipstream reads those alone"
            )
        return tuple(file.tensors[name].shape)

    (vocab_size, d_model), (n_heads, head_dim) = shape("emb.weight"), shape("blocks.0.att.r_k")
    n_layers = 1 + max((int(found[1]) for name in file.names() if (found := BLOCK.match(name))), default=0)
    ranks = {
        "decay_rank": shape("blocks.0.att.w1")[1],
        "rate_rank": shape("blocks.0.att.a1")[1],
        "gate_rank": shape("blocks.0.att.g1")[1],
        "value_rank": shape("blocks.1.att.v1")[1] if n_layers > 1 else None,
    }
    time_mix = part("rwkv7", ranks, n_heads=n_heads, norm_eps=None if head_dim == 64 else HEAD_EPS / head_dim)
    channel_mix = part("rwkv7_channel_mix", d_ff=shape("blocks.0.ffn.key.weight")[0])
    sizes = {"n_layers": n_layers, "d_model": d_model, "vocab_size": vocab_size, "value_residual": n_layers > 1}
    stream = {"norm": "layer", "norm_eps": 1e-5, "embedding_norm": True, "tie_embeddings": False}
    return model_config(pattern([(time_mix, channel_mix)]), sizes, stream)


def _rules(config: ModelConfig) -> list[Rule]:
    """Which tensors are which."""
    first, *others = range(config.n_layers)
    return [
        rename("emb.weight", "embedding.weight"),
        rename("blocks.0.ln0", "embedding.norm"),
        rename("ln_out", "stack.norm"),
        rename("head", "head.proj"),
        *in_blocks(_block("wag"), [first], "blocks"),
        *in_blocks(_block("wagv"), others, "blocks"),
    ]


def _block(low_rank: str) -> list[Rule]:
    """low_rank: what is made by a pair of matrices, and for all but the gate a bias."""
    return [
        rename("ln1", "norms.0"),
        rename("ln2", "norms.1"),
        *(rename(f"att.{theirs}", f"mixers.0.{ours}") for theirs, ours in PROJECTIONS.items()),
        *(_line(f"att.x_{n}", f"mixers.0.x_{n}", (1, 1, -1)) for n in "rwkvag"),
        *(_line(f"att.{n}", f"mixers.0.{n}", (-1,)) for n in ("k_k", "k_a")),
        rename("att.r_k", "mixers.0.r_k"),
        *(
            _turned(f"att.{n}{i}", f"mixers.0.{n}_lora.lora.{at}.weight")
            for n in low_rank
            for i, at in ((1, 0), (2, 2))
        ),
        *(_line(f"att.{n}0", f"mixers.0.{n}_lora.lora.2.bias", (-1,)) for n in low_rank if n != "g"),
        _line("ffn.x_k", "mixers.1.x_k", (-1,)),
        rename("ffn.key", "mixers.1.key"),
        rename("ffn.value", "mixers.1.value"),
    ]


def _line(theirs: str, ours: str, shape: tuple[int, ...]) -> Rule:
    """Numbers of the channels, which they keep as (1 1 D)."""
    return changed(theirs, ours, lambda t: t.reshape(shape), lambda t: t.reshape(1, 1, -1))


def _turned(theirs: str, ours: str) -> Rule:
    """A matrix that multiplies from the right."""
    return changed(theirs, ours, Tensor.t, Tensor.t)
