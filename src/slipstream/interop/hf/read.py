"""A Hugging Face folder as a model of ours: settings, tensors, tokenizer, and what is said of its use.

The model is built without storage, and each parameter comes to it as it is read: memory is that of the model and of one
tensor. What a checkpoint claims is compared with what it holds before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slipstream.core.errors import InputError
from slipstream.core.files import read_table
from slipstream.interop.dtypes import DTYPES, dtype_named
from slipstream.interop.hf.family import family
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.stored import Checkpoint, opened
from slipstream.interop.hf.weights import Rule, bound
from slipstream.interop.uninitialised import Uninitialised
from slipstream.models.checkpoint import TIED, read_tokenizer, stored
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
        filling = Filling(model, checkpoint.respelt(kind.spelling), folder)
        filling.fill(kind.rules(model), _dtype(dtype, about), lambda name: kind.surplus(name, config))
    model.tokenizer = read_tokenizer(folder / "tokenizer.json")
    model.conventions = Conventions.read(folder)
    return model.eval()


def without_storage(config: ModelConfig, tensors: int | None = None, owner: str = "the model") -> LanguageModel:
    """A model whose parameters have shapes alone. tensors: those that there are, which its layers cannot outnumber."""
    if tensors is not None and config.n_layers > tensors:
        raise InputError(f"{owner} says {config.n_layers} layers, but the checkpoint has only {tensors} tensors")
    try:
        with torch.device("meta"), Uninitialised():
            return LanguageModel(config)
    except (RuntimeError, OverflowError, MemoryError, ZeroDivisionError) as error:
        raise InputError(f"{owner} describes no possible model ({' '.join(str(error).split()):.120})") from None


def _dtype(asked: torch.dtype | str | None, about: dict[str, Any]) -> torch.dtype | None:
    if asked is None:
        return DTYPES.get(str(about.get("dtype") or about.get("torch_dtype")).removeprefix("torch."))
    return dtype_named(asked)


@dataclass(frozen=True)
class Filling:
    """A model without storage, the checkpoint that it is filled from, where that is, and what its shapes follow from."""

    model: LanguageModel
    there: Checkpoint
    path: Path
    by: str = "its config.json"

    def fill(self, rules: list[Rule], dtype: torch.dtype | None, surplus: Callable[[str], bool]) -> None:
        """Every parameter, from the tensors that the rules name; nothing may be missing, and nothing left over but surplus."""
        wanted = stored(self.model)
        names, used, buffers = self.there.names(), set[str](), {n for n, _ in self.model.named_buffers()}
        for rule in bound(rules, wanted, self.path.name):
            if rule.otherwise is not None and names.issuperset(rule.otherwise.theirs):
                rule = rule.otherwise
            if missing := [n for n in rule.theirs if n not in names]:
                raise InputError(f"{self.path} lacks the tensor {missing[0]}; {self.by} says that it has it")
            used.update(rule.theirs)
            for name, tensor in self._read(rule, [wanted[n].shape for n in rule.ours]):
                dtype = dtype or tensor.dtype
                _put(self.model, name, tensor.to(tensor.dtype if name in buffers else dtype, copy=True))
        self._tie(rules, used)
        if left := sorted(n for n in names - used if not surplus(n)):
            raise InputError(
                f"{self.path} has the tensor {left[0]}, which {self.by} does not speak of ({len(left)} such)"
            )

    def _read(self, rule: Rule, shapes: list[torch.Size]) -> list[tuple[str, Tensor]]:
        """Names and tensors of ours. Every one must be of numbers, and of its shape."""
        theirs, first = [self.there.get(n) for n in rule.theirs], f"{self.path}: {(rule.theirs or rule.ours)[0]}"
        try:
            ours = list(rule.read(theirs))
        except (RuntimeError, IndexError, ValueError):
            ours = []
        sizes = ", ".join(str(list(t.shape)) for t in theirs[:3])
        if [t.shape for t in ours] != shapes:
            wanted = ", ".join(str(list(shape)) for shape in shapes)
            raise InputError(f"{first} is {sizes}; {self.by} makes {rule.ours[0]} {wanted} of it")
        if not all(t.is_floating_point() for t in ours):
            raise InputError(f"{first} holds {theirs[0].dtype}; quantised checkpoints cannot be read so far")
        return list(zip(rule.ours, ours))

    def _tie(self, rules: list[Rule], used: set[str]) -> None:
        """The head as the embedding; where a file has it a second time, it must be the same."""
        if not self.model.config.tie_embeddings:
            return
        embedding = self.model.embedding.weight
        self.model.head.proj.weight = embedding
        heads, left = [r for r in rules if TIED.startswith(r.ours[0])], self.there.names() - used
        for name in [n for r in heads for n in r.theirs for n in (n, f"{n}.weight") if n in left]:
            head = self.there.get(name)
            if head.shape != embedding.shape or not torch.equal(head.to(embedding.dtype), embedding):
                raise InputError(
                    f"{self.path}: {name} differs from the embeddings, though config.json ties them; set tie_word_embeddings "
                    "false"
                )
            used.add(name)


def _put(model: LanguageModel, name: str, tensor: Tensor) -> None:
    """A parameter or buffer, in the place of one without storage."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor)


def parameter_names(model: LanguageModel) -> list[str]:
    """Of what is stored of a model."""
    return list(stored(model))
