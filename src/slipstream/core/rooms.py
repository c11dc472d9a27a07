"""A room that is also a function: `ss.mixers()` lists what the package `slipstream.mixers` holds."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


def callable_room(room: str, home: str, function: str) -> None:
    """Make the package `room` callable: it calls `function` of the module `home`, imported on the first call."""

    class Room(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(import_module(home), function)(*args, **kwargs)

    sys.modules[room].__class__ = Room
