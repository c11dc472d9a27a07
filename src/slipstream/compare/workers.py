"""Processes that work side by side, one thread each: tiny models are several times slower on two threads than on one.

A worker is told a task over its pipe and answers with news and, at the end, records. When the parent is gone, the next
piece of news finds the pipe broken and the worker ends; what it trained is in its run folder.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

PATIENCE = 5.0  # seconds a worker gets to save what it has

Tell = Callable[[float, str], None]  # share done, what is going on


@dataclass(frozen=True)
class Task:
    """work(tell, *arguments) -> records, in another process. weight: expected seconds."""

    name: str
    work: Callable[..., list[dict[str, Any]]]
    arguments: tuple[Any, ...]
    weight: float


@dataclass(frozen=True)
class News:
    """How far a task is."""

    task: Task
    share: float
    text: str


@dataclass(frozen=True)
class Done:
    """A task that ended. failure: why it has no records, or ''."""

    task: Task
    records: list[dict[str, Any]]
    failure: str = ""


def run_all(tasks: list[Task], jobs: int) -> Iterator[News | Done]:
    """Work through the tasks, `jobs` at a time, longest first. Ctrl-C reaches the workers, which save what they have."""
    waiting = sorted(tasks, key=lambda t: -t.weight)
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, tuple[Any, Task]] = {}
    try:
        for _ in range(min(jobs, len(tasks))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            workers[ours] = (process, _give(ours, waiting))
        while workers:
            for pipe in wait(list(workers)):
                yield from _hear(pipe, workers, waiting)  # type: ignore[arg-type]
    finally:
        _dismiss(workers)


def _give(pipe: Connection, waiting: list[Task]) -> Task:
    task = waiting.pop(0)
    pipe.send((task.work, task.arguments))
    return task


def _hear(pipe: Connection, workers: dict[Connection, tuple[Any, Task]], waiting: list[Task]) -> Iterator[News | Done]:
    process, task = workers[pipe]
    try:
        kind, *content = pipe.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        del workers[pipe]
        yield Done(
            task,
            [],
            f"its process ended with code {process.exitcode}" + (" (out of memory?)" if process.exitcode == -9 else ""),
        )
        return
    if kind == "news":
        yield News(task, *content)
        return
    yield Done(task, *content)
    if waiting:
        workers[pipe] = (process, _give(pipe, waiting))
    else:
        pipe.send(None)
        process.join()
        del workers[pipe]


def _dismiss(workers: dict[Connection, tuple[Any, Task]]) -> None:
    """End what still runs. A Ctrl-C has reached the workers too, and they save; else they are asked to; then made to."""
    for process, _ in workers.values():
        process.join(PATIENCE)
        if process.is_alive() and process.pid:
            os.kill(process.pid, signal.SIGINT)
            process.join(PATIENCE)
        process.kill()


def _serve(pipe: Connection) -> None:
    """The worker: one thread, one task after another."""
    import torch

    torch.set_num_threads(1)
    try:
        while (order := pipe.recv()) is not None:
            work, arguments = order
            pipe.send(("done", *_attempt(work, arguments, lambda share, text: pipe.send(("news", share, text)))))
    except (KeyboardInterrupt, BrokenPipeError, ConnectionResetError, EOFError):
        return


def _attempt(
    work: Callable[..., list[dict[str, Any]]], arguments: tuple[Any, ...], tell: Tell
) -> tuple[list[dict[str, Any]], str]:
    try:
        return work(tell, *arguments), ""
    except (BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:  # one architecture that fails must not end the comparison of the others
        return [], f"{type(error).__name__}: {error}"
