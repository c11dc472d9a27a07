"""Models that are about to be filled need no random numbers. Those of tensors without storage would cost a second: torch draws them
in Python, which imports all of its compiler first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode

DRAWN = frozenset(["normal_", "uniform_", "trunc_normal_", "log_normal_", "exponential_", "kaiming_uniform_"])


class Uninitialised(TorchFunctionMode):
    """Within it, nothing is drawn in place."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", None) in DRAWN:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
