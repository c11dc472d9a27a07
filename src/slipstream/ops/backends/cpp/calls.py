"""Calling a kernel, and offering it to its op: contiguous tensors go as addresses (None as null), sizes as 64-bit integers."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from slipstream.ops.backends.cpp.library import library
from slipstream.ops.dispatch import Backend, Call, register
from slipstream.ops.tape import note_kernel

SUFFIX = {torch.float32: "f32", torch.float64: "f64", torch.complex64: "c64", torch.complex128: "c128"}
REAL = (torch.float32, torch.float64)


def call(kernel: str, name: str, dtype: torch.dtype, tensors: Sequence[Tensor | None], *sizes: float) -> None:
    """Run a kernel's function for this dtype; the kernel is known to be there. sizes: whole numbers, or others as doubles."""
    function = _function(kernel, name, dtype, len(tensors), *map(type, sizes))
    arguments = (*[None if t is None else t.data_ptr() for t in tensors], *sizes)
    function(*arguments)
    note_kernel(function, arguments, tensors)


@functools.cache
def _function(kernel: str, name: str, dtype: torch.dtype, n_tensors: int, *sizes: type) -> Any:
    found = library(kernel, SUFFIX[dtype])
    assert found is not None, f"{kernel} was chosen and is not there"
    function = getattr(found, f"{name}_{SUFFIX[dtype]}")
    function.restype = None
    function.argtypes = [ctypes.c_void_p] * n_tensors + [
        ctypes.c_double if s is float else ctypes.c_int64 for s in sizes
    ]
    return function


def as_type(x: Any, dtype: torch.dtype) -> Any:
    """x in this dtype; asking first costs a tenth of what `to` does."""
    return x if x is None or x.dtype is dtype else x.to(dtype)


def blank(x: Tensor) -> Tensor:
    """A contiguous tensor of x's shape, which nothing has been written to."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def rows(x: Tensor) -> tuple[Tensor, int]:
    """x as rows of its last axis, and how far apart they stand: a slice of wider rows is not copied."""
    if x.is_contiguous():
        return x, x.shape[-1]
    outer = [(n, step) for n, step in zip(x.shape[:-1], x.stride()[:-1]) if n != 1]
    if not outer:
        return x.contiguous(), x.shape[-1]
    evenly = all(far == n * near for (_, far), (n, near) in pairwise(outer))
    step = outer[-1][1]
    return (x, step) if evenly and step >= x.shape[-1] and x.stride(-1) == 1 else (x.contiguous(), x.shape[-1])


def offer(
    op: str,
    run: Callable[..., Any],
    dtypes: Collection[torch.dtype] = REAL,
    kernel: str | None = None,
    gradients: bool = True,
) -> None:
    """Make a kernel, by default that of the op's own name, a backend of the op, for these dtypes on a CPU.

    gradients: whether it has them; else the torch form runs where they are wanted.
    """

    def accepts(given: Call) -> bool:
        return given.device == "cpu" and given.dtype in dtypes and (gradients or not given.needs_grad)

    register(op, Backend("cpp", accepts, run, lambda given: library(kernel or op, SUFFIX[given.dtype]) is not None))
