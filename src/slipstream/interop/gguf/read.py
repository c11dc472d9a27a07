"""A GGUF file as a model of ours: settings, tensors, tokenizer, and what is said of its use.

The file's settings become those of a config.json, and its tensors get transformers' names, so that the family of interop/hf
reads them. A file whose matrices are all in blocks that a quantised model can keep as they are (see packed.py) becomes one; in
any other, blocks become float32 once, and the log says so. Asked for "int8", all are kept in 8 bits a weight, rounded where they
must be. Tensors in float32 and bfloat16 are the file's own mapped memory; float16 becomes float32, for that is what the norms
beside it are in.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slipstream.core.errors import InputError, nearest
from slipstream.interop.gguf.architecture import Architecture, There, architecture_of, own_settings
from slipstream.interop.gguf.blocks import PLAIN, weights_of
from slipstream.interop.gguf.container import GGUF
from slipstream.interop.gguf.packed import HOW, are_exact, as_they_are, kinds_of_blocks, named, rounded, settle
from slipstream.interop.gguf.vocabulary import Vocabulary
from slipstream.interop.hf.family import family
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.read import DTYPES, parameter_names, without_storage
from slipstream.interop.hf.weights import Rule, bound
from slipstream.interop.hf.weights import as_they_are as unchanged
from slipstream.models.language_model import LanguageModel

log = logging.getLogger(__name__)
INT8 = "int8"
SURPLUS = ("rope_freqs.weight",)  # settings in the form of a tensor


def load_gguf(path: Path, dtype: torch.dtype | str | None = None) -> LanguageModel:
    """The model in a file. dtype: of all its numbers, or int8; when None as they are stored, quantised blocks if all can be kept.

    Raises InputError when its architecture is not known, when it does what slipstream cannot, and when it is damaged.
    """
    file = GGUF(path)
    vocabulary = Vocabulary(file.settings, str(path))
    with ThreadPoolExecutor(1) as beside:  # a large vocabulary takes as long as all weights
        tokenizer = beside.submit(vocabulary.tokenizer)
        model = _model(file, dtype)
        model.tokenizer, model.conventions = tokenizer.result(), vocabulary.conventions()
    return model.eval()


def _model(file: GGUF, asked: torch.dtype | str | None) -> LanguageModel:
    kind = architecture_of(file.settings)
    there = There({n: t.shape for n, t in file.tensors.items()}, lambda name: _tensor(file, name, torch.float32))
    table = config_of(kind, file.settings, there, str(file.path))
    fields = Fields(table, str(file.path))
    config = family(kind.model_type).config(fields)
    fields.finish()
    model = without_storage(config, len(file.tensors), str(file.path))
    rules = bound(family(kind.model_type).rules(model), parameter_names(model), file.path.name)
    shapes = {n: t.shape for n, t in model.state_dict().items()}
    if asked == INT8 or (asked is None and are_exact(file)):
        model = without_storage(config.model_copy(update={"quantisation": HOW}))
    elif asked is None and (packed := kinds_of_blocks(file)):
        log.warning(
            "%s: blocks of %s become float32; --dtype int8 rounds them to 8 bits instead", file.path.name, packed
        )
    dtype = None if asked == INT8 else _dtype(asked)
    filling = _Filling(file, kind, table, shapes, frozenset(model.state_dict()), dtype or _stored_dtype(file))
    model.load_state_dict(dict(filling.tensors(rules)), strict=False, assign=True)
    settle(model, filling.dtype)
    if config.tie_embeddings and model.config.quantisation is None:
        model.head.proj.weight = model.embedding.weight
    return model


def config_of(kind: Architecture, settings: dict[str, Any], there: There, owner: str) -> dict[str, Any]:
    """config.json of a file's settings. Raises InputError for one that nobody asked for."""
    said = Fields(own_settings(settings, kind.name), f"{owner}: {kind.name}")
    config = kind.config(said, there)
    said.finish()
    return config


def _dtype(asked: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(asked, str):
        if asked not in DTYPES:
            raise InputError(f"no dtype {asked!r}; {nearest(asked, [*DTYPES, INT8])}")
        return DTYPES[asked]
    return asked


@dataclass
class _Filling:
    """Every parameter, as the table of the family names it; nothing may be missing and nothing left over.

    table: config.json. shapes: of all parameters, were none quantised. names: of those that are wanted.
    """

    file: GGUF
    kind: Architecture
    table: dict[str, Any]
    shapes: dict[str, torch.Size]
    names: frozenset[str]
    dtype: torch.dtype
    roundings: list[str] = field(default_factory=list)
    sources: dict[str, Rule] = field(default_factory=dict)  # of transformers' tensors, in llama.cpp's
    made: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self, rules: list[Rule]) -> Iterator[tuple[str, Tensor]]:
        used, file = set(SURPLUS), self.file
        table = self.kind.translation((n for rule in rules for n in rule.theirs), self.table)
        self.sources = {name: source for source in table for name in source.ours}
        for rule in rules:
            theirs = self._stored(rule)
            if missing := [n for n in theirs if n not in file.tensors]:
                raise InputError(f"{file.path} lacks the tensor {missing[0]}; its settings say that it has it")
            used.update(theirs)
            yield from self._of(rule)
        if left := sorted(set(file.tensors) - used):
            raise InputError(
                f"{file.path} has the tensor {left[0]}, which its settings do not speak of ({len(left)} such)"
            )
        if self.roundings:
            log.warning("%s: rounded to 8 bits a weight: %s", file.path.name, _counted(self.roundings))

    def _stored(self, rule: Rule) -> list[str]:
        """The tensors of the file that it takes."""
        return list(dict.fromkeys(n for name in rule.theirs for n in self.sources[name].theirs))

    def _of(self, rule: Rule) -> Iterator[tuple[str, Tensor]]:
        """What a rule makes of these tensors, in the form that the model wants."""
        if rule.read is unchanged and rule.ours[0] not in self.names and self._fits(rule):
            source = self.sources[rule.theirs[0]]
            packed = as_they_are(self.file, source.theirs[0], source.read)
            if packed is not None:
                yield from named(rule.ours[0], packed, self.names)
                return
        for name, tensor in zip(rule.ours, self._numbers(rule)):
            if name in self.names:
                yield name, tensor
                continue
            self.roundings += [self.file.tensors[n].kind.name for n in self._stored(rule)]
            yield from named(name, rounded(tensor), self.names)

    def _fits(self, rule: Rule) -> bool:
        """Whether it is one matrix of the file, of the shape that is wanted."""
        source = self.sources[rule.theirs[0]]
        shape = self.file.tensors[source.theirs[0]].shape
        return len(source.theirs) == len(source.ours) == 1 and shape == self.shapes[rule.ours[0]]

    def _numbers(self, rule: Rule) -> list[Tensor]:
        """Parameters of ours. Raises InputError when these tensors do not fit the rule."""
        try:
            made = list(rule.read([self._theirs(name) for name in rule.theirs]))
        except (RuntimeError, IndexError, ValueError):
            made = []
        if [t.shape for t in made] != [self.shapes[n] for n in rule.ours]:
            sizes = ", ".join(f"{n} {list(self.file.tensors[n].shape)}" for n in self._stored(rule)[:3])
            wanted = f"{rule.ours[0]} {list(self.shapes[rule.ours[0]])}"
            raise InputError(f"{self.file.path}: {sizes} should make {wanted}; download it again")
        return made

    def _theirs(self, name: str) -> Tensor:
        """transformers' tensor. What else comes of the same tensors of the file is kept until it is asked for."""
        if name not in self.made:
            source = self.sources[name]
            read = source.read([_tensor(self.file, n, self.dtype) for n in source.theirs])
            self.made.update(zip(source.ours, (t.contiguous() for t in read), strict=True))
        return self.made.pop(name)


def _tensor(file: GGUF, name: str, dtype: torch.dtype) -> Tensor:
    stored = file.tensors[name]
    return weights_of(stored.kind, file.raw(name), dtype).view(stored.shape)


def _counted(kinds: list[str]) -> str:
    return ", ".join(f"{n} matrices of {kind}" for kind, n in sorted(Counter(kinds).items()))


def _stored_dtype(file: GGUF) -> torch.dtype:
    """bfloat16 or float64 where the embeddings have it; else float32."""
    stored = file.tensors["token_embd.weight"].kind.name
    return PLAIN[stored] if stored in ("BF16", "F64") else torch.float32
