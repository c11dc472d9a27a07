"""A model of ours as a GGUF file that llama.cpp runs, tokenizer included.

Matrices are written in the dtype of the model (float32, float16 or bfloat16), norms, biases and what else has one axis in float32,
as llama.cpp wants them. As with Hugging Face folders, what was said in settings is read back, and a model that came out different
is not written.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.interop.gguf.architecture import Architecture, There, all_architectures, architecture
from slipstream.interop.gguf.container_out import write_gguf
from slipstream.interop.gguf.read import config_of
from slipstream.interop.gguf.vocabulary_out import their_vocabulary
from slipstream.interop.hf.family import family
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.read import parameter_names, without_storage
from slipstream.interop.hf.weights import bound
from slipstream.interop.hf.write import differences, expressed
from slipstream.models.language_model import LanguageModel

FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}


def save_gguf(model: LanguageModel, path: Path, name: str | None = None) -> str:
    """Write the file and return its architecture, the first that can say the model if none is asked for.

    Raises InputError with what no architecture, or not this one, can say.
    """
    dtype = model.embedding.weight.dtype
    if model.config.quantisation is not None:
        raise InputError("a quantised model cannot be written as GGUF: export the one it was made from")
    if dtype not in FILE_TYPES:
        raise InputError(f"{dtype} cannot be written as GGUF; --dtype float32, float16 or bfloat16")
    kind, table = _expressed(model, name)
    tensors = _tensors(model, kind, table)
    settings = {f"{kind.name}.{key}": value for key, value in kind.settings(table).items()}
    _hold_to(model, kind, table, settings, tensors)
    about = {"general.architecture": kind.name, "general.type": "model", "general.file_type": FILE_TYPES[dtype]}
    vocabulary = their_vocabulary(model.tokenizer, model.conventions, model.config.vocab_size)
    write_gguf(path, about | settings | vocabulary, tensors)
    return kind.label or kind.name


def _expressed(model: LanguageModel, name: str | None) -> tuple[Architecture, dict[str, Any]]:
    """The architecture that can say the model, and its config.json. Raises InputError with the reason of the one asked for."""
    if name is not None:
        return architecture(name), expressed(model, architecture(name).model_type)[1]
    for kind in all_architectures().values():
        with suppress(InputError):
            return kind, expressed(model, kind.model_type)[1]
    raise InputError(
        f"no architecture of llama.cpp that slipstream writes is {model.config.pattern!r:.80}; --family says why one is not: "
        + ", ".join(all_architectures())
    )


def _tensors(model: LanguageModel, kind: Architecture, table: dict[str, Any]) -> dict[str, Tensor]:
    """By llama.cpp's names, in its forms."""
    own, theirs, tensors = model.state_dict(), dict[str, Tensor](), dict[str, Tensor]()
    for rule in bound(family(kind.model_type).rules(model), parameter_names(model), kind.name):
        theirs.update(zip(rule.theirs, rule.write([own[n] for n in rule.ours])))
    for rule in kind.translation(theirs, table):
        wide = kind.is_wide(rule.theirs[0])
        parts = [t.float() if t.ndim == 1 or wide else t for t in map(theirs.__getitem__, rule.ours)]
        tensors.update(zip(rule.theirs, (t.contiguous() for t in rule.write(parts))))
    return tensors | kind.extra(table)


def _hold_to(
    model: LanguageModel,
    kind: Architecture,
    table: dict[str, Any],
    settings: dict[str, Any],
    tensors: dict[str, Tensor],
) -> None:
    """Raises InputError when the settings are those of another model."""
    there = There({n: tuple(t.shape) for n, t in tensors.items()}, tensors.__getitem__)
    of_table = family(kind.model_type).config
    if (baked := kind.baked(table)) != table:
        model = without_storage(of_table(Fields(baked, kind.name)))
    fields = Fields(config_of(kind, settings, there, kind.name), kind.name)
    if unlike := differences(model, of_table(fields)):
        raise InputError(f"{kind.name} in llama.cpp cannot say this model: {unlike[0]}")
