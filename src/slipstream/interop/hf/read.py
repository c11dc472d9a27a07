"""A Hugging Face folder as a model of ours: settings, tensors, tokenizer, and what is said of its use.

The model is built without storage, and each parameter comes to it as it is read: memory is that of the model and of one
tensor. What a checkpoint claims is compared with what it holds before anything is allocated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slipstream.core.errors import InputError
from slipstream.core.files import read_table
from slipstream.interop.dtypes import DTYPES, dtype_named
from slipstream.interop.hf.family import Family, family
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.stored import Checkpoint, opened
from slipstream.interop.hf.weights import Rule, bound
from slipstream.models.checkpoint import TIED, read_tokenizer
from slipstream.models.config import ModelConfig
from slipstream.models.conventions import Conventions
from slipstream.models.language_model import LanguageModel


def load_hf(folder: Path, dtype: torch.dtype | str | None = None) -> LanguageModel:
    """The model in a folder. dtype: of all its numbers; as they are stored when None.

    Raises InputError when its family is not known, when it does what slipstream cannot, and when a file is damaged.
    """
    about = read_table(folder / "config.json")
    kind = family(about.get("model_type"))
    fields = Fields(about, str(folder / "config.json"))
    config = kind.config(fields)
    fields.finish()
    with opened(folder) as checkpoint:
        model = without_storage(config, len(checkpoint.names()), fields.owner)
        _fill(model, kind, checkpoint.respelt(kind.spelling), _dtype(dtype, about), folder)
    model.tokenizer = read_tokenizer(folder / "tokenizer.json")
    model.conventions = Conventions.read(folder)
    return model.eval()


def without_storage(config: ModelConfig, tensors: int | None = None, owner: str = "the model") -> LanguageModel:
    """A model whose parameters have shapes alone. tensors: those that there are, which its layers cannot outnumber."""
    if tensors is not None and config.n_layers > tensors:
        raise InputError(f"{owner} says {config.n_layers} layers, but the checkpoint has only {tensors} tensors")
    try:
        with torch.device("meta"):
            return LanguageModel(config)
    except (RuntimeError, OverflowError, MemoryError, ZeroDivisionError) as error:
        raise InputError(f"{owner} describes no possible model ({' '.join(str(error).split()):.120})") from None


def _dtype(asked: torch.dtype | str | None, about: dict[str, Any]) -> torch.dtype | None:
    if asked is None:
        return DTYPES.get(str(about.get("dtype") or about.get("torch_dtype")).removeprefix("torch."))
    return dtype_named(asked)


def _fill(model: LanguageModel, kind: Family, there: Checkpoint, dtype: torch.dtype | None, folder: Path) -> None:
    """Every parameter, from the tensors that the table names; nothing may be missing and nothing left over."""
    wanted = {n: t for n, t in model.state_dict().items() if not (n == TIED and model.config.tie_embeddings)}
    names, used, buffers = there.names(), set[str](), {n for n, _ in model.named_buffers()}
    for rule in bound(kind.rules(model), wanted, folder.name):
        if missing := [n for n in rule.theirs if n not in names]:
            raise InputError(f"{folder} lacks the tensor {missing[0]}; its config.json says that it has it")
        used.update(rule.theirs)
        for name, tensor in _read(rule, there, [wanted[n].shape for n in rule.ours], folder):
            dtype = dtype or tensor.dtype
            _put(model, name, tensor.to(tensor.dtype if name in buffers else dtype, copy=True))
    _tie(model, kind, there, used, folder)
    left = sorted(n for n in names - used if not kind.surplus(n, model.config))
    if left:
        raise InputError(
            f"{folder} has the tensor {left[0]}, which its config.json does not speak of ({len(left)} such)"
        )


def _read(rule: Rule, there: Checkpoint, shapes: list[torch.Size], folder: Path) -> list[tuple[str, Tensor]]:
    """Names and tensors of ours. Every one must be of numbers, and of its shape."""
    theirs = [there.get(n) for n in rule.theirs]
    try:
        ours = list(rule.read(theirs))
    except (RuntimeError, IndexError, ValueError):
        ours = []
    sizes = ", ".join(str(list(t.shape)) for t in theirs[:3])
    if [t.shape for t in ours] != shapes:
        wanted = ", ".join(str(list(shape)) for shape in shapes)
        raise InputError(f"{folder}: {rule.theirs[0]} is {sizes}; config.json makes {rule.ours[0]} {wanted} of it")
    if not all(t.is_floating_point() for t in ours):
        raise InputError(
            f"{folder}: {rule.theirs[0]} holds {theirs[0].dtype}; quantised checkpoints cannot be read so far"
        )
    return list(zip(rule.ours, ours))


def _put(model: LanguageModel, name: str, tensor: Tensor) -> None:
    """A parameter or buffer, in the place of one without storage."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor)


def _tie(model: LanguageModel, kind: Family, there: Checkpoint, used: set[str], folder: Path) -> None:
    """The head as the embedding; where a file has it a second time, it must be the same."""
    if not model.config.tie_embeddings:
        return
    model.head.proj.weight = model.embedding.weight
    heads = [r for r in kind.rules(model) if TIED.startswith(r.ours[0])]
    for name in [n for r in heads for n in r.theirs for n in (n, f"{n}.weight") if n in there.names() - used]:
        head = there.get(name)
        if head.shape != model.embedding.weight.shape or not torch.equal(
            head.to(model.embedding.weight.dtype), model.embedding.weight
        ):
            raise InputError(
                f"{folder}: {name} differs from the embeddings, though config.json ties them; set tie_word_embeddings false"
            )
        used.add(name)


def parameter_names(model: LanguageModel) -> list[str]:
    """What is stored of a model: a tied head is not."""
    return [n for n in model.state_dict() if not (n == TIED and model.config.tie_embeddings)]
