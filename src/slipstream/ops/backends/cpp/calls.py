"""Calling a kernel: contiguous tensors go as addresses (None as null), sizes as 64-bit integers."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slipstream.ops.backends.cpp.library import library

SUFFIX = {torch.float32: "f32", torch.float64: "f64", torch.complex64: "c64", torch.complex128: "c128"}


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


@functools.cache
def available(kernel: str) -> bool:
    """Whether the kernel is there, compiled now if need be."""
    return library(kernel) is not None
