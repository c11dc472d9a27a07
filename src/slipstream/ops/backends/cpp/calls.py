"""Calling a kernel, and offering it to its op: contiguous tensors go as addresses (None as null), sizes as 64-bit integers."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from slipstream.ops.backends.cpp.library import library
from slipstream.ops.dispatch import Backend, Call, register

SUFFIX = {torch.float32: "f32", torch.float64: "f64", torch.complex64: "c64", torch.complex128: "c128"}
REAL = (torch.float32, torch.float64)


def call(kernel: str, name: str, dtype: torch.dtype, tensors: Sequence[Tensor | None], *sizes: int) -> None:
    """Run a kernel's function for this dtype; the kernel is known to be there."""
    function = _function(kernel, f"{name}_{SUFFIX[dtype]}", len(tensors), len(sizes))
    function(*(None if t is None else t.data_ptr() for t in tensors), *sizes)


@functools.cache
def _function(kernel: str, name: str, n_tensors: int, n_sizes: int) -> Any:
    found = library(kernel)
    assert found is not None, f"{kernel} was chosen and is not there"
    function = getattr(found, name)
    function.restype = None
    function.argtypes = [ctypes.c_void_p] * n_tensors + [ctypes.c_int64] * n_sizes
    return function


def offer(op: str, run: Callable[..., Any], dtypes: Collection[torch.dtype] = REAL) -> None:
    """Make the kernel of that name a backend of the op of that name, for these dtypes on a CPU."""

    def accepts(given: Call) -> bool:
        return given.device == "cpu" and given.dtype in dtypes

    register(op, Backend("cpp", accepts, run, lambda: library(op) is not None))
