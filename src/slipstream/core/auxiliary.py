"""What mixers tell whoever trains them: losses beside that of the text, and what keeps experts in use.

    collector = Collector()                     one a training step
    with collector.listening():
        loss = objective.loss(model, part)
    (loss + collector.penalty()).backward()     parts of a batch one after another
    optimizer.step()
    collector.settle()                          biases that follow the load

A router tells which experts its tokens chose. A part that only chooses (Mixer.no_gradient) has no gradient from the text: its
mixer hands over a lesson, a loss of that part alone, which is made when the penalty is asked for.

Only a trainer opens one. Where none is open, telling costs nothing, and nothing stays in a module either way. A layer may be
computed again for its gradient (torch.utils.checkpoint without use_reentrant): what it tells then is not heard.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer


@dataclass(frozen=True)
class Told:
    """One call. logits: of its router (None where it has none); chosen: experts by number, others stand for none; dropped: how
    many of these choices were not served."""

    logits: Float[Tensor, "*B E"] | None
    chosen: Int[Tensor, "*B k"]
    dropped: Int[Tensor, ""] | int = 0


class Router(ABC):
    """Who tells, in forward and prefill: a mixer whose tokens choose among n_choices experts."""

    n_choices: int

    @abstractmethod
    def penalty(self, told: Told, load: Int[Tensor, "E"]) -> Float[Tensor, ""] | float:
        """The losses of one call, weighed as the settings say. load: choices of each expert in the whole step so far."""

    def settle(self, load: Int[Tensor, "E"], tokens: int) -> None:  # noqa: B027 - most have nothing to move
        """After a training step: move what follows the load, which is a buffer, stored with the weights."""


@dataclass
class Usage:
    """Of one router in one step. load: how often each expert was chosen."""

    load: Int[Tensor, "E"]
    tokens: int = 0
    dropped: Int[Tensor, ""] | int = 0


Lesson = Callable[
    [], tuple[Float[Tensor, ""], Int[Tensor, ""]]
]  # the sum of a loss of one part alone, over so many tokens


class Collector:
    """Hears what is told while it listens. usage, taught (mean losses of lessons): of the whole step so far."""

    def __init__(self) -> None:
        self.usage: dict[Router, Usage] = {}
        self.taught: dict[Mixer, list[Tensor]] = {}
        self._heard: list[tuple[Router, Told]] = []
        self._lessons: list[tuple[Mixer, float, Lesson]] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        token = _open.set(self)
        try:
            yield
        finally:
            _open.reset(token)

    def hear(self, router: Router, told: Told) -> None:
        load = torch.bincount(told.chosen.flatten(), minlength=router.n_choices)[: router.n_choices]
        usage = self.usage.setdefault(router, Usage(torch.zeros_like(load)))
        usage.load = usage.load + load
        usage.tokens += told.chosen.shape[:-1].numel()
        usage.dropped = usage.dropped + told.dropped
        self._heard.append((router, told))

    def learn(self, pupil: Mixer, weight: float, lesson: Lesson) -> None:
        self._lessons.append((pupil, weight, lesson))

    def penalty(self) -> Tensor | float:
        """The losses of what was heard since the last time, with the load of the whole step so far: of a batch that is read in
        parts, the last is judged by all of it."""
        heard, self._heard = self._heard, []
        return sum(router.penalty(told, self.usage[router].load) for router, told in heard) + self._of_lessons()

    def _of_lessons(self) -> Tensor | float:
        """Of a mixer that was called several times, the mean over all tokens."""
        lessons, self._lessons = self._lessons, []
        sums: dict[Mixer, tuple[float, Tensor, Tensor]] = {}
        for pupil, weight, lesson in lessons:
            loss, tokens = lesson()
            _, before, until = sums.get(pupil, (weight, torch.zeros_like(loss), torch.zeros_like(tokens)))
            sums[pupil] = weight, before + loss, until + tokens
        total: Tensor | float = 0.0
        for pupil, (weight, loss, tokens) in sums.items():
            mean = loss / tokens.clamp(min=1)
            self.taught.setdefault(pupil, []).append(mean.detach())
            total = total + weight * mean
        return total

    def settle(self) -> None:
        """After the optimiser's step."""
        for router, usage in self.usage.items():
            router.settle(usage.load, usage.tokens)


class _Refusing(Collector):
    """Stands where an open collector could not be served by routers. Lessons, which reach no other part, it hands on."""

    def __init__(self, why: str, behind: Collector) -> None:
        super().__init__()
        self.why, self.behind = why, behind

    def hear(self, router: Router, told: Told) -> None:
        raise InputError(self.why)

    def learn(self, pupil: Mixer, weight: float, lesson: Lesson) -> None:
        self.behind.learn(pupil, weight, lesson)


_open: ContextVar[Collector | None] = ContextVar("open_collector", default=None)


def tell(router: Router, logits: Tensor | None, chosen: Tensor, dropped: Tensor | int = 0) -> None:
    """To the collector that is open, if one is."""
    if (collector := _open.get()) is not None:
        collector.hear(router, Told(logits, chosen, dropped))


def teach(pupil: Mixer, weight: float, lesson: Lesson) -> None:
    """To the collector that is open, if one is: the lesson of a mixer's part that only chooses, unless it weighs nothing."""
    if weight and (collector := _open.get()) is not None:
        collector.learn(pupil, weight, lesson)


@contextmanager
def refused(why: str) -> Iterator[None]:
    """Within it, a router that tells an open collector is refused with this reason."""
    if (collector := _open.get()) is None:
        yield
        return
    with _Refusing(why, collector).listening():
        yield
