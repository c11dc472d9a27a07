"""Ctrl-C as a wish: the step in hand is finished and saved first; a second Ctrl-C stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """asked: whether Ctrl-C was pressed."""

    asked = False


@contextmanager
def on_interrupt() -> Iterator[Interrupt]:
    """Within, the first Ctrl-C only sets `asked`. Outside the main thread, where no signals arrive, it does nothing."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        interrupt.asked = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
