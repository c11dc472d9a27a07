"""What a policy is, and how its name becomes one: "h2o:512" is the policy h2o with the argument 512.

A policy changes how a trained mixer runs and none of its weights. It is lossy by intent: what it leaves out is gone, and where a
prompt is cut can then change what is left out. Where nothing has to be left out, it equals full attention in every mode.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.errors import InputError, nearest
from slipstream.core.state import Slot, State
from slipstream.ops.softmax import PLAIN, Softmax

Turn = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class KVHeads:
    """What a softmax mixer keeps of a token: a key and a value for each of n_kv_heads."""

    n_heads: int
    n_kv_heads: int
    k_head_dim: int
    v_head_dim: int

    def slots(self, tokens: int, grows: bool = False) -> dict[str, Slot]:
        """Room for the keys and values of so many tokens, in the activations' dtype."""
        dims = {"k": self.k_head_dim, "v": self.v_head_dim}
        return {n: Slot((tokens, self.n_kv_heads, d), dtype=None, grows=grows) for n, d in dims.items()}


class Policy(ABC):
    """Every policy states where it is from and what the number after its name means ("" when it takes none)."""

    name: ClassVar[str]
    paper: ClassVar[str]
    takes: ClassVar[str] = ""

    def __init_subclass__(cls, name: str | None = None, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:
            cls.name = name


class PrefillPolicy(Policy):
    """Which keys the tokens of a prompt read."""

    @classmethod
    @abstractmethod
    def read_argument(cls, argument: str | None, causal: bool) -> PrefillPolicy:
        """The policy of what stands behind the colon. Raises InputError when that cannot be."""

    @abstractmethod
    def attend(
        self,
        q: Float[Tensor, "B T H K"],
        k: Float[Tensor, "B S G K"],
        v: Float[Tensor, "B S G V"],
        past: Int[Tensor, "B"],
        lengths: Int[Tensor, "B"] | None,
        softmax: Softmax,
    ) -> Float[Tensor, "B T H V"]:
        """Causal: k and v are laid out by position, those of the T new tokens included; q_t of row b stands at past_b + t."""


def unturned(k: Tensor, by: Tensor) -> Tensor:
    """Keys without positions are the same wherever they stand."""
    return k


@dataclass(frozen=True)
class Reading:
    """How a mixer reads what is kept. turn: rotates keys (B S G K) by so many positions more (B S), as its rope does.
    prompt: how the tokens of a prompt read what was full attention."""

    prompt: PrefillPolicy
    softmax: Softmax = PLAIN
    turn: Turn = field(default=unturned)


class CachePolicy(Policy):
    """What is kept of keys and values. It holds no tensors: what it remembers is in the mixer's state, under its slots."""

    def __init__(self, kv: KVHeads) -> None:
        self.kv = kv

    @classmethod
    @abstractmethod
    def read_argument(cls, argument: str | None, kv: KVHeads) -> CachePolicy:
        """The policy of what stands behind the colon. Raises InputError when that cannot be."""

    @abstractmethod
    def slots(self) -> dict[str, Slot]:
        """All that it keeps of a row."""

    @abstractmethod
    def prefill(
        self,
        q: Float[Tensor, "B T H K"],
        k: Float[Tensor, "B T G K"],
        v: Float[Tensor, "B T G V"],
        state: State,
        lengths: Int[Tensor, "B"] | None,
        how: Reading,
    ) -> tuple[Float[Tensor, "B T H V"], dict[str, Tensor]]:
        """Outputs of new tokens, which see what is kept and one another causally; and the new slots.

        Growing slots have room. Right-padded rows (lengths) may hold anything there, and it reaches neither.
        """

    @abstractmethod
    def step(
        self,
        q: Float[Tensor, "B 1 H K"],
        k: Float[Tensor, "B 1 G K"],
        v: Float[Tensor, "B 1 G V"],
        state: State,
        how: Reading,
    ) -> tuple[Float[Tensor, "B 1 H V"], dict[str, Tensor]]:
        """One token: static shapes, no host synchronisation."""

    @abstractmethod
    def keys_read(self, tokens: int) -> float:
        """Keys that a query head compares with to make one token after so many (whole key vectors' worth of reading)."""


def cache_policy(spec: str, kv: KVHeads, causal: bool = True) -> CachePolicy:
    """The policy written as name or name:argument. Raises InputError for an unknown name or an argument that cannot be."""
    cls, argument = _parsed(spec, "cache", "caches")
    if not causal and spec != "full":
        raise InputError(f"cache {spec} goes by what comes after what; with causal=false only full can be")
    return cls.read_argument(argument, kv)


def prefill_policy(spec: str, causal: bool = True) -> PrefillPolicy:
    """The same for prompts. What is not causal can only be read densely."""
    cls, argument = _parsed(spec, "prefill", "prefills")
    if not causal and spec != "dense":
        raise InputError(f"prefill_policy {spec} chooses among earlier tokens; with causal=false only dense can be")
    return cls.read_argument(argument, causal)


def cache_policies() -> dict[str, type[CachePolicy]]:
    """Every cache policy: name -> class."""
    return {name: _class("caches", name) for name in _names("caches")}


def prefill_policies() -> dict[str, type[PrefillPolicy]]:
    """Every prefill policy: name -> class."""
    return {name: _class("prefills", name) for name in _names("prefills")}


def no_argument(name: str, argument: str | None) -> None:
    """Raises InputError when one was given."""
    if argument is not None:
        raise InputError(f"the policy {name} takes no argument; write {name}, not {name}:{argument}")


def whole_number(name: str, argument: str | None, default: int, least: int = 1) -> int:
    """The argument as a number of tokens. Raises InputError when it is not one, or too small."""
    if argument is None:
        return default
    if not argument.isdecimal() or int(argument) < least:
        raise InputError(f"the policy {name} takes a whole number from {least}, as {name}:{default}; got {argument!r}")
    return int(argument)


def _parsed(spec: str, kind: str, folder: str) -> tuple[Any, str | None]:
    name, colon, argument = spec.partition(":")
    if name not in _names(folder):
        raise InputError(f"no {kind} policy {name!r}; {nearest(name, _names(folder))}")
    return _class(folder, name), argument if colon else None


@functools.cache
def _names(folder: str) -> tuple[str, ...]:
    """Of the policies in a folder, which are those of their files."""
    package = importlib.import_module(f"slipstream.policies.{folder}")
    return tuple(m.name for m in pkgutil.iter_modules(package.__path__))


def _class(folder: str, name: str) -> Any:
    """The policy of that name; only its file is imported."""
    module = importlib.import_module(f"slipstream.policies.{folder}.{name}")
    own = (c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__)
    return next(c for c in own if issubclass(c, Policy) and c.name == name)
