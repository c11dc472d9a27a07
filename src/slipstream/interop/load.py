"""A model from wherever it is: what slipstream saved, a Hugging Face folder of a known family, a file (GGUF, RWKV-7's .pth), or
a hub name."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from slipstream.core.errors import InputError
from slipstream.core.files import read_table
from slipstream.interop.dtypes import dtype_named
from slipstream.models import checkpoint
from slipstream.models.language_model import LanguageModel

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WANTED = ["*.json", "*.safetensors", "*.jinja"]


def load(path: str | Path, dtype: torch.dtype | str | None = None) -> LanguageModel:
    """The model in a folder (or beside a model.safetensors file), or in a .gguf file, with its tokenizer, ready to run; or in a
    .pth file of RWKV-7, which has no tokenizer.

    "org/name" is, where there is no folder org, a name on the Hugging Face hub. dtype: of the weights, such as "float32"; as
    they are stored when None. Raises InputError when there is no model, when it is of an unknown kind, or when a file is damaged.
    """
    folder = Path(path)
    if not folder.exists() and not folder.parent.is_dir() and HUB_NAME.fullmatch(str(path)):
        folder = _from_hub(str(path))
    if folder.is_file() and (folder.suffix == ".gguf" or _begins_with(folder, b"GGUF")):
        from slipstream.interop.gguf.read import load_gguf

        return load_gguf(folder, dtype)
    if folder.is_file() and folder.suffix == ".pth":
        from slipstream.interop.rwkv7 import load_rwkv7

        return load_rwkv7(folder, dtype)
    home = folder.parent if folder.suffix == ".safetensors" else folder
    if _is_foreign(home / "config.json"):
        from slipstream.interop.hf.read import load_hf

        return load_hf(home, dtype)
    model = checkpoint.load(folder)
    return model if dtype is None else checkpoint.cast(model, dtype_named(dtype))


def _begins_with(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def _is_foreign(config: Path) -> bool:
    """Whether there is a config.json whose model_type is not ours. Raises InputError when it is damaged."""
    return config.is_file() and read_table(config).get("model_type") != checkpoint.MODEL_TYPE


def _from_hub(name: str) -> Path:
    """The folder of a snapshot, from the cache or downloaded. Raises InputError with what is missing."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f'there is no folder {name}; to look for it on the Hugging Face hub: pip install "slipstream[hf]"'
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except Exception as error:  # the hub's errors are of many libraries
        said = " ".join(str(error).split())
        raise InputError(
            f"there is no folder {name}, and the Hugging Face hub did not give it ({type(error).__name__}: {said:.160}); "
            "download it where there is a network, and give its folder"
        ) from None
