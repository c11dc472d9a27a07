"""A model on disk: a Hugging Face directory (config.json, model.safetensors, tokenizer.json, generation_config.json)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from slipstream.core.errors import InputError, nearest
from slipstream.core.files import replacing, write_text
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel

MODEL_TYPE = "slipstream"
TIED = "head.proj.weight"  # stored once, under the embedding's name


def save(model: LanguageModel, directory: str | Path) -> None:
    """Write the directory; each file is replaced whole, the weights last."""
    folder = Path(directory)
    about = {"model_type": MODEL_TYPE, "architectures": ["LanguageModel"], **model.config.model_dump()}
    write_text(folder / "config.json", json.dumps(about, indent=2) + "\n")
    write_text(
        folder / "generation_config.json",
        json.dumps({"do_sample": True, "temperature": 0.8, "max_new_tokens": 200}, indent=2) + "\n",
    )
    if model.tokenizer is not None:
        write_text(folder / "tokenizer.json", model.tokenizer.to_str(pretty=True))
    tensors = {
        n: t.contiguous() for n, t in model.state_dict().items() if not (n == TIED and model.config.tie_embeddings)
    }
    with replacing(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, {"format": "pt"})


def load(path: str | Path) -> LanguageModel:
    """The model in a directory, or beside a model.safetensors file, with its tokenizer.

    Raises InputError when there is none, when it is of another kind, or when a file is cut short.
    """
    path = Path(path)
    folder = path.parent if path.suffix == ".safetensors" else path
    config = _read_config(folder)
    model = LanguageModel(config, _read_tokenizer(folder / "tokenizer.json"))
    weights = path if path.suffix == ".safetensors" else folder / "model.safetensors"
    _fill(model, _read_tensors(weights), weights)
    return model.eval()


def _read_config(folder: Path) -> ModelConfig:
    file = folder / "config.json"
    if not file.is_file():
        siblings = (
            [p.name for p in folder.parent.glob("*") if (p / "config.json").is_file()] if folder.parent.is_dir() else []
        )
        hint = nearest(folder.name, siblings) if siblings else "slipstream train makes one"
        raise InputError(f"no model in {folder} (config.json is missing); {hint}")
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is no JSON ({error}); write the checkpoint again") from None
    if about.pop("model_type", None) != MODEL_TYPE:
        raise InputError(f"{file} describes no slipstream model; only what slipstream saved can be loaded so far")
    about.pop("architectures", None)
    return ModelConfig(**about)


def _read_tokenizer(file: Path) -> Tokenizer | None:
    return Tokenizer.from_file(str(file)) if file.is_file() else None


def _read_tensors(file: Path) -> dict[str, Any]:
    try:
        with safe_open(file, framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise InputError(f"{file} is missing; the checkpoint was not finished") from None
    except SafetensorError as error:
        raise InputError(f"{file} is damaged or cut short ({error}); copy or train it again") from None


def _fill(model: LanguageModel, tensors: dict[str, Any], file: Path) -> None:
    """Put the tensors in; every name and shape must fit."""
    wanted = model.state_dict()
    if model.config.tie_embeddings:
        wanted.pop(TIED)
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which the model does not"
        raise InputError(
            f"{file} is of another architecture than config.json says: it {what} ({len(missing) + len(extra)} names differ)"
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise InputError(f"{file}: {name} is {list(tensor.shape)}, config.json makes it {list(wanted[name].shape)}")
    model.load_state_dict(tensors, strict=False)
