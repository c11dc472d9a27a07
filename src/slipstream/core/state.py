"""State: everything a mixer remembers, as named tensors with the batch first.

Because every slot has the batch on axis 0, cloning, selecting rows, joining batches, moving and storing are
written once, here, for every architecture. A model's state is the states of its mixers under dotted names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.core.files import replacing


@dataclass(frozen=True)
class Slot:
    """One tensor of a state: its dims after the batch, how it starts, and how it is kept.

    dtype means "at least" (promoted with the activations'); None is the activations' own; a whole-number one is as it is.
    grows: dims[0] counts tokens, as in a key-value cache; with every, it counts entries, one for so many tokens begun.
    """

    dims: tuple[int, ...]
    dtype: torch.dtype | None = torch.float32
    start: float = 0.0
    grows: bool = False
    every: int = 1

    def after(self, tokens: int) -> tuple[int, ...]:
        """Its dims when it has room for so many tokens."""
        return (-(-tokens // self.every), *self.dims[1:]) if self.grows else self.dims

    def dtype_beside(self, activations: torch.dtype) -> torch.dtype:
        """Its dtype in a mixer of such activations. Whole numbers (codes, positions) stay what they are."""
        if self.dtype is not None and not (self.dtype.is_floating_point or self.dtype.is_complex):
            return self.dtype
        return torch.promote_types(self.dtype or activations, activations)


@dataclass
class State:
    """slots: name -> (B, *dims); length: tokens each row has seen. A call consumes the state it is given: clone to keep one."""

    slots: dict[str, Tensor]
    length: Int[Tensor, "B"]

    def __getitem__(self, name: str) -> Tensor:
        return self.slots[name]

    def map(self, f: Callable[[Tensor], Tensor]) -> State:
        return State({name: f(t) for name, t in self.slots.items()}, f(self.length))

    def clone(self) -> State:
        return self.map(torch.clone)

    def detach(self) -> State:
        return self.map(torch.detach)

    def rows(self, index: Tensor) -> State:
        """Keep, drop, repeat or reorder sequences: index is int (N) or a bool mask (B)."""
        return self.map(lambda t: t[index])

    def to(self, device: torch.device | str) -> State:
        return self.map(lambda t: t.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, capacity included."""
        return sum(t.nbytes for t in self.slots.values())

    def advance(self, tokens: int | Tensor, **slots: Tensor) -> State:
        """The state after so many more tokens, with these slots replaced."""
        return State({**self.slots, **slots}, self.length + tokens)

    @staticmethod
    def cat(states: Sequence[State]) -> State:
        """Join batches. Growing slots of different capacity are brought to the largest."""
        first = states[0]
        slots = {name: _cat_rows([s.slots[name] for s in states]) for name in first.slots}
        return State(slots, torch.cat([s.length for s in states]))

    def parts(self, depth: int) -> dict[str, State]:
        """All scopes of names that many words deep, in one pass: what join joined. A part without slots is not among them."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, slot in self.slots.items():
            *words, rest = name.split(".", depth)
            found.setdefault(".".join(words), {})[rest] = slot
        return {prefix: State(slots, self.length) for prefix, slots in found.items()}

    def scope(self, prefix: str) -> State:
        """The slots under `prefix.`, without the prefix."""
        head = prefix + "."
        return State({n[len(head) :]: t for n, t in self.slots.items() if n.startswith(head)}, self.length)

    @staticmethod
    def join(parts: Mapping[str, State], length: Tensor) -> State:
        """The inverse of scope: many states under dotted names as one."""
        return State({f"{p}.{n}": t for p, s in parts.items() for n, t in s.slots.items()}, length)

    def save(self, path: str | Path, metadata: dict[str, str] | None = None) -> None:
        """Write a safetensors file (under a temporary name, then renamed)."""
        from safetensors.torch import save_file

        tensors = dict(_as_stored(n, t.detach().cpu()) for n, t in self.slots.items())
        with replacing(Path(path)) as temporary:
            save_file(
                {**tensors, "length": self.length.cpu()}, temporary, {"format": "slipstream.state", **(metadata or {})}
            )

    @classmethod
    def load(cls, path: str | Path) -> State:
        """Read what save wrote. Raises InputError when the file is not a state or is cut short."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(str(path))
        except SafetensorError as error:
            raise InputError(f"{path} is no complete state file ({error}); write it again with --save-state") from None
        if "length" not in tensors:
            raise InputError(f"{path} holds tensors but no slipstream state; --save-state writes one")
        return cls(dict(_as_kept(n, t) for n, t in tensors.items() if n != "length"), tensors["length"])


def _as_stored(name: str, slot: Tensor) -> tuple[str, Tensor]:
    """Complex numbers are written as pairs of real ones: safetensors holds no complex128."""
    if slot.is_complex():
        return f"complex.{name}", torch.view_as_real(slot.resolve_conj()).contiguous()
    return f"slot.{name}", slot.contiguous()


def _as_kept(name: str, stored: Tensor) -> tuple[str, Tensor]:
    kind, _, name = name.partition(".")
    return name, torch.view_as_complex(stored) if kind == "complex" else stored


def _cat_rows(tensors: list[Tensor]) -> Tensor:
    if tensors[0].ndim > 1:
        most = max(t.shape[1] for t in tensors)
        tensors = [grow(t, most) for t in tensors]
    return torch.cat(tensors)


def grow(slot: Tensor, capacity: int, start: float = 0.0) -> Tensor:
    """A growing slot with room for `capacity` tokens on axis 1; unchanged when it has it already."""
    if slot.shape[1] >= capacity:
        return slot
    room = slot.new_full((slot.shape[0], capacity - slot.shape[1], *slot.shape[2:]), start)
    return torch.cat([slot, room], 1)
