"""The dtypes that weights can be loaded in, by name."""

from __future__ import annotations

import torch

from slipstream.core.errors import InputError, nearest

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def dtype_named(asked: torch.dtype | str) -> torch.dtype:
    """Raises InputError with the nearest name."""
    if isinstance(asked, torch.dtype):
        return asked
    if asked not in DTYPES:
        raise InputError(f"no dtype {asked!r}; {nearest(asked, DTYPES)}")
    return DTYPES[asked]
