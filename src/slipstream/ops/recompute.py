"""Memory for time: what a function makes on its way is made again for the gradient, and not kept until then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(f: Callable[..., Any], *args: Any) -> Any:
    """f(*args); where a gradient is wanted, only args are kept for it."""
    if not torch.is_grad_enabled():
        return f(*args)
    return checkpoint(f, *args, use_reentrant=False, preserve_rng_state=False)
