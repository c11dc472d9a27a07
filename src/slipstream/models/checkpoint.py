"""A model on disk: a Hugging Face directory (config.json, model.safetensors, tokenizer.json, generation_config.json)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from slipstream.core.errors import InputError, nearest
from slipstream.core.files import read_table, replacing, write_text
from slipstream.models.config import ModelConfig
from slipstream.models.conventions import Conventions
from slipstream.models.language_model import LanguageModel

MODEL_TYPE = "slipstream"
TIED = "head.proj.weight"  # where it is tied, stored once, under the embedding's name


def save(model: LanguageModel, directory: str | Path) -> None:
    """Write the directory; each file is replaced whole, the weights last."""
    folder = Path(directory)
    about = {"model_type": MODEL_TYPE, "architectures": ["LanguageModel"], **model.config.model_dump()}
    write_text(folder / "config.json", json.dumps(about, indent=2) + "\n")
    model.conventions.write(folder, model.tokenizer is not None)
    if model.tokenizer is not None:
        write_text(folder / "tokenizer.json", model.tokenizer.to_str(pretty=True))
    tensors = {n: t.contiguous() for n, t in stored(model).items()}
    with replacing(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, {"format": "pt"})


def load(path: str | Path) -> LanguageModel:
    """The model in a directory, or beside a model.safetensors file, with its tokenizer.

    Raises InputError when there is none, when it is of another kind, or when a file is cut short.
    """
    path = Path(path)
    folder = path.parent if path.suffix == ".safetensors" else path
    config = _read_config(folder)
    weights = path if path.suffix == ".safetensors" else folder / "model.safetensors"
    tensors = _read_tensors(weights)
    _refuse_unlike(config, tensors, weights)
    model = LanguageModel(config, read_tokenizer(folder / "tokenizer.json"), Conventions.read(folder))
    if (embedding := tensors.get("embedding.weight")) is not None:
        cast(model, embedding.dtype)
    model.load_state_dict(tensors, strict=False)
    return model.eval()


def cast(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """The model with its real numbers in a dtype. Not nn.Module.to, which takes their imaginary part from complex ones."""
    return model._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)


def _read_config(folder: Path) -> ModelConfig:
    file = folder / "config.json"
    if not file.is_file():
        siblings = (
            [p.name for p in folder.parent.glob("*") if (p / "config.json").is_file()] if folder.parent.is_dir() else []
        )
        hint = nearest(folder.name, siblings) if siblings else "slipstream train makes one"
        raise InputError(f"no model in {folder} (config.json is missing); {hint}")
    about = read_table(file)
    if about.pop("model_type", None) != MODEL_TYPE:
        raise InputError(f"{file} describes no model that slipstream saved; slipstream.load reads those of others too")
    about.pop("architectures", None)
    return ModelConfig(**about)


def read_tokenizer(file: Path) -> Tokenizer | None:
    """None when there is no such file. Raises InputError when it is damaged."""
    if not file.is_file():
        return None
    try:
        return Tokenizer.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises bare Exception, and its panics are not even that
        raise InputError(
            f"{file} is no tokenizer.json ({' '.join(str(error).split()):.120}); download it again"
        ) from None


def _read_tensors(file: Path) -> dict[str, Any]:
    try:
        with safe_open(file, framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise InputError(f"{file} is missing; the checkpoint was not finished") from None
    except SafetensorError as error:
        raise InputError(f"{file} is damaged or cut short ({error}); copy or train it again") from None


def stored(model: LanguageModel) -> dict[str, Tensor]:
    """What is kept of a model: every tensor once, under the first of its names. Tied layers, and a tied head, have several."""
    first: dict[int, str] = {}
    named = model.state_dict(keep_vars=True).items()
    return {name: tensor.detach() for name, tensor in named if first.setdefault(id(tensor), name) == name}


def _refuse_unlike(config: ModelConfig, tensors: dict[str, Any], file: Path) -> None:
    """Every name and shape must be as config.json says, which is found before there is room for any of it."""
    if config.n_layers > len(tensors):
        raise InputError(f"{file} has {len(tensors)} tensors, too few for the {config.n_layers} layers of config.json")
    with torch.device("meta"):
        wanted = stored(LanguageModel(config))
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which the model does not"
        raise InputError(
            f"{file} is of another architecture than config.json says: it {what} ({len(missing) + len(extra)} names differ)"
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise InputError(f"{file}: {name} is {list(tensor.shape)}, config.json makes it {list(wanted[name].shape)}")
        if tensor.dtype.is_floating_point != wanted[name].dtype.is_floating_point:
            raise InputError(f"{file}: {name} is {tensor.dtype}, config.json makes it {wanted[name].dtype}")
