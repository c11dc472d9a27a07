"""A model written in another format, by the format's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from slipstream.core.errors import InputError, nearest
from slipstream.interop.config import ExportConfig
from slipstream.interop.load import load
from slipstream.models.language_model import LanguageModel

Writer = Callable[[LanguageModel, Path, str | None], str]


def export(settings: ExportConfig) -> str:
    """Load, write, and say as what: a model_type, or the format's name. Raises InputError when it cannot be said."""
    if settings.format not in WRITERS:
        raise InputError(f"no format {settings.format!r}; {nearest(settings.format, WRITERS)}")
    if settings.out.exists() and settings.out.is_dir() == (settings.format in FILES):
        wanted, there = ("file", "folder") if settings.out.is_dir() else ("folder", "file")
        raise InputError(f"{settings.out} is a {there}; --out takes a {wanted} for --format {settings.format}")
    if settings.out.resolve() == Path(settings.run).resolve():
        raise InputError(f"{settings.out} is the model itself; write to another folder")
    return WRITERS[settings.format](load(settings.run, settings.dtype), settings.out, settings.family)


def _hf(model: LanguageModel, out: Path, family: str | None) -> str:
    from slipstream.interop.hf.write import save_hf

    return save_hf(model, out, family)


def _gguf(model: LanguageModel, out: Path, family: str | None) -> str:
    from slipstream.interop.gguf.write import save_gguf

    return save_gguf(model, out, family)


def _own(model: LanguageModel, out: Path, family: str | None) -> str:
    if family is not None:
        raise InputError(f"--format slipstream writes no family; leave out --family {family}")
    model.save(out)
    return "slipstream"


WRITERS: dict[str, Writer] = {"hf": _hf, "gguf": _gguf, "slipstream": _own}
FILES = ("gguf",)  # formats that are one file
