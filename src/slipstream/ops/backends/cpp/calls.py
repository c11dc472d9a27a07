"""Calling a kernel: tensors as addresses, sizes as 64-bit integers."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from slipstream.ops.backends.cpp.library import library

SUFFIX = {torch.float32: "f32", torch.float64: "f64", torch.complex64: "c64", torch.complex128: "c128"}


def function(kernel: str, name: str) -> Any:
    """A function of a kernel that is known to be there."""
    found = library(kernel)
    assert found is not None, f"{kernel} was chosen and is not there"
    call = getattr(found, name)
    call.restype = None
    return call


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """Of a contiguous tensor's first number; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def suffix(tensor: Tensor) -> str:
    """What a kernel's functions for this dtype end with."""
    return SUFFIX[tensor.dtype]
