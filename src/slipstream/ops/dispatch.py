"""Where an op's form is chosen, per call, by what the call is: device, dtype, whether gradients are wanted.

Never by what happens to be installed: a backend that is absent is reported by `slipstream doctor`, and the torch form runs.
Also where packed documents (cu_seqlens) become rows of their own, once for all ops.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slipstream.core.documents import check_cu_seqlens, groups, unpack


@dataclass(frozen=True)
class Call:
    """What a backend may decide on."""

    device: str
    dtype: torch.dtype
    needs_grad: bool


@dataclass(frozen=True)
class Backend:
    """A faster form of one op: same arguments, same results. accepts decides by the call alone; ready is asked once it has
    accepted, makes the form ready, and is false, after saying why, on a machine that cannot."""

    name: str
    accepts: Callable[[Call], bool]
    run: Callable[..., Any]
    ready: Callable[[Call], bool] = lambda call: True


BACKEND_HOMES = ("slipstream.ops.backends.cpp",)
BACKENDS: dict[str, list[Backend]] = {}
OPS: set[str] = set()  # every public op whose file has been imported
_torch_alone: ContextVar[bool] = ContextVar("torch_alone", default=False)


def register(op: str, backend: Backend) -> None:
    """Offer a backend for an op; the first registered that accepts a call runs it."""
    BACKENDS.setdefault(op, []).append(backend)
    _backend.cache_clear()


def chosen(op: str, call: Call) -> str:
    """Name of the form that would run: a backend's, or "torch"."""
    return next((b.name for b in offered(op) if b.accepts(call) and b.ready(call)), "torch")


def offered(op: str) -> list[Backend]:
    """The op's backends: the files of its name below ops/backends, and what else was registered."""
    _import_backends(op)
    return BACKENDS.get(op, [])


@functools.cache
def _import_backends(op: str) -> None:
    for home in BACKEND_HOMES:
        if importlib.util.find_spec(f"{home}.{op}"):
            importlib.import_module(f"{home}.{op}")


@contextmanager
def torch_forms() -> Iterator[None]:
    """Within it every op runs its torch form: what a backend is compared with, and what counts flops by matrix products."""
    token = _torch_alone.set(True)
    try:
        yield
    finally:
        _torch_alone.reset(token)


def operator(*time: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make the torch form of an op the public one. time: the arguments laid out (B T ...).

    The op takes `lengths` (B) of right-padded rows; the public form also takes `cu_seqlens` of documents packed in one row
    and then gives (1 T ...) outputs and one final state row a document.
    """

    def wrap(torch_form: Callable[..., Any]) -> Callable[..., Any]:
        op, names = torch_form.__name__, list(inspect.signature(torch_form).parameters)
        OPS.add(op)

        @functools.wraps(torch_form)
        def public(*args: Any, cu_seqlens: Tensor | None = None, **kwargs: Any) -> Any:
            if cu_seqlens is None:
                return _run(op, torch_form, args, kwargs)
            arguments = dict(zip(names, args)) | kwargs
            return _packed(lambda **a: _run(op, torch_form, (), a), time, arguments, cu_seqlens)

        return public

    return wrap


def _run(op: str, torch_form: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_compiling() or _torch_alone.get():  # no compiler sees into a kernel
        return torch_form(*args, **kwargs)
    first = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
    needs_grad = torch.is_grad_enabled() and any(getattr(a, "requires_grad", False) for a in (*args, *kwargs.values()))
    backend = _backend(op, first.device.type, first.dtype, needs_grad)
    return (backend.run if backend else torch_form)(*args, **kwargs)


@functools.cache
def _backend(op: str, device: str, dtype: torch.dtype, needs_grad: bool) -> Backend | None:
    """Asked at every call of every op, so the answer is kept: it depends on nothing else."""
    call = Call(device, dtype, needs_grad)
    return next((b for b in offered(op) if b.accepts(call) and b.ready(call)), None)


def _packed(run: Callable[..., Any], time: tuple[str, ...], arguments: dict[str, Any], cu_seqlens: Tensor) -> Any:
    """Run each document as a row of its own; entering and final states hold one row a document."""
    along = [
        n for n in time if arguments.get(n) is not None and arguments[n].ndim > 1
    ]  # a constant per head has no time
    bounds = check_cu_seqlens(cu_seqlens, arguments[along[0]].shape[1])
    ys: dict[int, Tensor] = {}
    finals: dict[int, Any] = {}
    for group in groups(bounds):
        rows: dict[str, Any] = {}
        for name in along:
            rows[name], rows["lengths"] = unpack(arguments[name], bounds, group)
        if arguments.get("state") is not None:
            rows["state"] = _pick(arguments["state"], group)
        y, final = run(**{**arguments, **rows})
        for n, i in enumerate(group):
            ys[i], finals[i] = y[n, : bounds[i + 1] - bounds[i]], _pick(final, [n])
    order = range(len(bounds) - 1)
    return torch.cat([ys[i] for i in order])[None], _join([finals[i] for i in order])


def _pick(state: Any, rows: list[int]) -> Any:
    return tuple(_pick(s, rows) for s in state) if isinstance(state, tuple) else state[rows]


def _join(states: list[Any]) -> Any:
    if isinstance(states[0], tuple):
        return tuple(_join(list(parts)) for parts in zip(*states))
    return torch.cat(states)
