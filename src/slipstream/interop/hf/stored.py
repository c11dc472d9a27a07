"""The tensors of a checkpoint on disk, by name, one read at a time from a memory map: safetensors, or torch's pickles.

Files come from strangers: names in an index must be files of the folder, a pickle is read as weights only (no code runs), and
what is damaged or cut short is told. Checked here is what can be read; whether shapes fit is for whoever knows the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.core.files import read_table

KINDS = ("model.safetensors", "pytorch_model.bin", "model.pth")


class Stored(ABC):
    """A file that is open."""

    @abstractmethod
    def names(self) -> list[str]:
        """Of all its tensors."""

    @abstractmethod
    def get(self, name: str) -> Tensor:
        """One of them. Raises InputError when the file is damaged there."""


class Checkpoint:
    """All files of a checkpoint that are open."""

    def __init__(self, files: dict[str, Stored], spelt: dict[str, str] | None = None) -> None:
        """spelt: for each name that is asked for, the one in its file; the same for all when None."""
        self.files = files  # name of a tensor -> the file that has it
        self.spelt = spelt or {name: name for name in files}

    def names(self) -> set[str]:
        return set(self.spelt)

    def get(self, name: str) -> Tensor:
        name = self.spelt[name]
        return self.files[name].get(name)

    def respelt(self, spelling: Callable[[str], str]) -> Checkpoint:
        """The same tensors under the names that this makes of theirs."""
        return Checkpoint(self.files, {spelling(name): name for name in self.files})


@contextmanager
def opened(folder: Path) -> Iterator[Checkpoint]:
    """The checkpoint of a folder. Raises InputError when it has none, or when a file is missing or damaged."""
    with ExitStack() as held:
        paths = {path: _open(path, held) for path in _files(folder)}
        files = {name: stored for stored in paths.values() for name in stored.names()}
        if not files:
            raise InputError(f"{folder} holds weights files without a single tensor; download it again")
        yield Checkpoint(files)


def _files(folder: Path) -> list[Path]:
    """Those of the first kind that is there, whole or in parts."""
    for name in KINDS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return [_part(folder, index, part) for part in _parts(index)]
    raise InputError(f"{folder} has a config.json but no weights ({' or '.join(KINDS)}); the download is not complete")


def _parts(index: Path) -> list[str]:
    table = read_table(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(part, str) for part in table.values()):
        raise InputError(f"{index} has no weight_map from tensors to files; download it again")
    return sorted(set(table.values()))


def _part(folder: Path, index: Path, part: str) -> Path:
    if Path(part).name != part or Path(part).suffix != Path(index.name.removesuffix(".index.json")).suffix:
        raise InputError(f"{index} names {part!r}, which is no weights file of its folder")
    if not (folder / part).is_file():
        raise InputError(f"{folder / part} is missing, which {index.name} names; the download is not complete")
    return folder / part


def _open(path: Path, held: ExitStack) -> Stored:
    return _Safetensors(path, held) if path.suffix == ".safetensors" else Pickled(path)


class _Safetensors(Stored):
    def __init__(self, path: Path, held: ExitStack) -> None:
        self.path = path
        try:
            self.file = held.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError, ValueError) as error:
            raise self._damaged(error) from None

    def names(self) -> list[str]:
        return list(self.file.keys())

    def get(self, name: str) -> Tensor:
        try:
            return self.file.get_tensor(name)
        except (SafetensorError, RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> InputError:
        said = " ".join(str(error).split())
        return InputError(f"{self.path} is damaged or cut short ({said:.120}); download it again")


class Pickled(Stored):
    """A file of torch's. What is not made of its own bytes (a row repeated, numbers of no storage) is no tensor of it."""

    def __init__(self, path: Path) -> None:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a damaged pickle can raise anything at all
            said = " ".join(str(error).split())
            raise InputError(f"{path} cannot be read as weights alone ({said:.120}); use safetensors") from None
        tensors = tensors if isinstance(tensors, dict) else {}
        self.tensors = {n: t for n, t in tensors.items() if isinstance(n, str) and _is_whole(t)}

    def names(self) -> list[str]:
        return list(self.tensors)

    def get(self, name: str) -> Tensor:
        return self.tensors[name]


def _is_whole(value: object) -> bool:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return value.nbytes <= value.untyped_storage().nbytes()
