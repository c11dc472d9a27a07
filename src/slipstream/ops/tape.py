"""A tape: what a computation on fixed tensors did, as a list of calls that do it again in the same memory.

One token costs a model some thousand small calls, and most of the time of a small call goes by before its first number is
read. On a tape stands only what has to be done anew: torch's functions, writing where they wrote the first time, and kernels
with their addresses. Views are no work, what comes of weights alone is there already, and what nobody reads is left out.

The same calls do the same only where nothing in between asked what a number was. Where somebody did (`int(t)`, a mask that
chooses how many), or drew at random, the tape says so in `refused` and is not to be run; what was computed while it was
recorded is right all the same.

A kernel (ops/backends) may write to what its caller made for it, empty or full of one number, and to what was given to
`record` as varying, the slots of a state among them; never to a tensor that was computed from others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Again = Callable[[], object]

EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
FILLED = {f"{how}{what}" for what in ("zeros", "ones", "full") for how in ("", "new_")}
FILLED |= {"zeros_like", "ones_like", "full_like", "arange", "scalar_tensor", "eye"}
READ_ON_THE_HOST = {
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__dlpack__,
}  # those that torch does not dispatch
_recorder: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)


@dataclass
class Tape:
    """calls: in order. memory: what they read and write by address. refused: why they cannot be run again, or nothing."""

    calls: list[Again] = field(default_factory=list)
    memory: list[Tensor] = field(default_factory=list)
    refused: str = ""

    def run(self) -> None:
        for call in self.calls:
            call()


def record(run: Callable[[], Any], varying: Sequence[Tensor]) -> tuple[Any, Tape]:
    """What run gives, tensors in tuples, lists and dicts, and how to make it again once `varying` hold other numbers. All other
    tensors stay what they are.

    It writes to the same tensors again, so what run gave is to be read, or copied, before the next time. Without gradients.
    """
    assert not torch.is_grad_enabled(), "a tape has no gradients"
    recorder = _Recorder(varying)
    token = _recorder.set(recorder)
    try:
        with _HostReads(recorder), recorder:
            result = run()
    finally:
        _recorder.reset(token)
    return result, recorder.tape(tree_leaves(result))


def note_kernel(function: Callable[..., object], arguments: Sequence[Any], tensors: Iterable[Tensor | None]) -> None:
    """Tell the tape that is being recorded, if one is, of a kernel's call, which no dispatcher of torch's sees."""
    if (recorder := _recorder.get()) is not None:
        recorder.kernel(partial(function, *arguments), [t for t in tensors if t is not None])


@dataclass
class _Entry:
    """A call. reads, writes: storages. varies: it reads what varies."""

    again: Again
    reads: set[int]
    writes: set[int]
    varies: bool
    tensors: list[Tensor]  # whose memory it uses


class _Recorder(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled while a tape is recorded. To be told to skip it, torch loads its compiler, for seconds."""
        return False

    def __init__(self, varying: Sequence[Tensor]) -> None:
        super().__init__()
        self.given = set(map(_storage, varying))
        self.varying = set(self.given)
        self.made: set[int] = set()  # by callers, for kernels to write to
        self.entries: list[_Entry] = []
        self.alive: list[Tensor] = list(varying)  # a storage that is gone could come back as another
        self.refused = ""

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        self._note(op, args, kwargs, out)
        return out

    def _note(self, op: Any, args: tuple, kwargs: dict, out: Any) -> None:
        given, got = _tensors((args, kwargs)), _tensors(out)
        reads, name = set(map(_storage, given)), op.overloadpacket.__name__
        changes = {_storage(t) for t in _changed(op, args, kwargs)}
        new = set(map(_storage, got)) - reads
        self.alive += got
        if name in EMPTY | FILLED:
            self.made |= new
            reads = set()  # the shape of what they are like, no more
        varies = bool(reads & self.varying)
        if why := _refusal(op, varies, args, kwargs, out):
            self.refused = self.refused or why
        if name in EMPTY or not (new or changes) or self.refused:
            return  # views, and memory that waits to be written
        again = partial(op, *args, **kwargs) if changes else _again(op, args, kwargs, out)
        self._add(_Entry(again, reads, new | changes, varies, given + got))

    def kernel(self, again: Again, tensors: list[Tensor]) -> None:
        reads = set(map(_storage, tensors))
        self.alive += tensors
        self._add(_Entry(again, reads, reads & (self.made | self.varying), bool(reads & self.varying), tensors))

    def refuse_read(self, t: Tensor, name: str) -> None:
        if _storage(t) in self.varying:
            self.refused = self.refused or f"{name} asks for numbers that differ from call to call"

    def _add(self, entry: _Entry) -> None:
        self.entries.append(entry)
        if entry.varies:
            self.varying |= entry.writes

    def tape(self, results: Iterable[Any]) -> Tape:
        """What has to be done again: what varies, what it overwrites before, and of both only what is read."""
        if self.refused:
            return Tape(refused=self.refused)
        overwritten = set().union(*(e.writes for e in self.entries if e.varies))
        wanted = self.given | {_storage(t) for t in results if isinstance(t, Tensor)}
        kept: list[_Entry] = []
        for entry in reversed(self.entries):
            if entry.writes & wanted and (entry.varies or entry.writes & overwritten):
                kept.append(entry)
                wanted |= entry.reads
        return Tape([e.again for e in reversed(kept)], [t for e in kept for t in e.tensors])


class _HostReads(TorchFunctionMode):
    """Sees what leaves torch without passing its dispatcher."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in READ_ON_THE_HOST:
            self.recorder.refuse_read(args[0], func.__name__)
        return func(*args, **(kwargs or {}))


def _storage(t: Tensor) -> int:
    """What tells whether two tensors lie in the same memory, as long as both are alive."""
    return t.untyped_storage()._cdata


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _changed(op: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The arguments that it writes to."""
    written = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [t for name in written for t in _tensors(_argument(name, op, args, kwargs))]


def _argument(name: str, op: Any, args: tuple, kwargs: dict) -> Any:
    """What an argument of that name is; None where there is none. What is not given has its default."""
    for i, a in enumerate(op._schema.arguments):
        if a.name == name:
            return args[i] if i < len(args) else kwargs.get(name, a.default_value)
    return None


def _refusal(op: Any, varies: bool, args: tuple, kwargs: dict, out: Any) -> str:
    """Why a call cannot be done again."""
    if torch.Tag.nondeterministic_seeded in op.tags and _argument("dropout_p", op, args, kwargs) != 0:
        return f"{op} draws at random"
    if varies and torch.Tag.dynamic_output_shape in op.tags and not _by_places(op, args):
        return f"{op} gives as many numbers as it finds"
    if varies and any(x is not None and not isinstance(x, Tensor) for x in tree_leaves(out)):
        return f"{op} asks for numbers that differ from call to call"
    return ""


def _by_places(op: Any, args: tuple) -> bool:
    """Indexing by whole numbers, which gives as many as there are of those; by a mask it would not."""
    masks = torch.bool, torch.uint8
    return op.overloadpacket.__name__ == "index" and all(t.dtype not in masks for t in _tensors(args[1]))


def _again(op: Any, args: tuple, kwargs: dict, out: Any) -> Again:
    """The call that writes what op gave where it is: its form with `out` where that is found to do so, else a copy."""
    if op.overloadpacket.__name__ in ("clone", "_to_copy"):
        return partial(out.copy_, args[0])
    forms = _with_out(op) if isinstance(out, Tensor) else ()
    for form in forms:
        call = partial(form, *args, **kwargs, out=out)
        if _does(call, out):
            return call
    return partial(_copied, op, args, kwargs, _tensors(out))


@cache
def _with_out(op: Any) -> tuple[Callable[..., object], ...]:
    """Forms of op with an argument `out`, the cheapest to call first."""
    packet = op.overloadpacket
    functions = [getattr(home, packet.__name__, None) for home in (torch, torch._C._nn)]
    overloads = [getattr(packet, name) for name in packet.overloads() if name.endswith("out")]
    return (*(f for f in functions if f is not None), *overloads)


def _does(call: Again, out: Tensor) -> bool:
    """Whether the call writes to out what is there already."""
    expected = out.clone()
    out.copy_(expected == 0)  # something else everywhere
    try:
        call()
    except (TypeError, RuntimeError):
        done = False
    else:
        same = (out == expected) | (out != out) & (expected != expected)
        done = out.shape == expected.shape and bool(same.all())
    out.copy_(expected)
    return done


def _copied(op: Any, args: tuple, kwargs: dict, outs: list[Tensor]) -> None:
    for out, new in zip(outs, _tensors(op(*args, **kwargs))):
        out.copy_(new)
