"""What a law is given: one mixer class, at its tiny size in float64, and inputs whose length no chunk divides."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, wraps
from typing import Any

import torch
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer
from slipstream.core.state import State

B, T = 3, 23
Law = Callable[["Subject"], None]


class Subject:
    """A mixer class under examination."""

    def __init__(self, cls: type[Mixer]) -> None:
        self.cls = cls

    def build(self, **changes: Any) -> Mixer:
        """Seeded weights, each moved off its start so that no term hides at zero or one."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            mixer = self.cls(self.cls.tiny.model_copy(update=changes)).double().eval()
            for p in mixer.parameters():
                p.data.add_(0.1 * torch.randn_like(p))
        return mixer

    @cached_property
    def mixer(self) -> Mixer:
        return self.build()

    def input(self, tokens: int = T) -> Tensor:
        """(3 tokens D), the same at every call."""
        return torch.randn(
            B, tokens, self.cls.tiny.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def expect(fact: bool, complaint: str) -> None:
    if not fact:
        raise AssertionError(complaint)


def needs(*modes: str) -> Callable[[Law], Law]:
    """A law that runs these modes. Where the mixer declares one impossible, the law is that it is refused, and why."""

    def wrap(law: Law) -> Law:
        @wraps(law)
        def law_or_refusal(s: Subject) -> None:
            refused = [mode for mode in modes if mode in s.cls.limits]
            for mode in refused:
                is_refused(s, mode)
            if not refused:
                law(s)

        return law_or_refusal

    return wrap


def is_refused(s: Subject, mode: str) -> None:
    """The mode raises InputError with the declared reason."""
    m, x, why = s.mixer, s.input(), s.cls.limits[mode]
    calls = {"step": lambda: m.step(x[:, :1], m.init_state(B, T)), "prefill": lambda: m.prefill(x, m.init_state(B, T))}
    try:
        calls[mode]()
    except InputError as error:
        expect(why in str(error), f"{mode} is refused with {error}, declared: {why}")
    else:
        raise AssertionError(f"{mode} is declared impossible, but runs")


def read_whole(mixer: Mixer, x: Tensor, room: int = 0) -> tuple[Tensor, State]:
    """Outputs and state (with room for more tokens) of a prefill from fresh; of forward, where there is no prefill."""
    state = mixer.init_state(len(x), x.shape[1] + room)
    return (mixer(x), state) if "prefill" in mixer.limits else mixer.prefill(x, state)


def in_pieces(mixer: Mixer, pieces: list[Tensor] | tuple[Tensor, ...], state: State) -> tuple[Tensor, State]:
    """Outputs of prefill over the pieces, end to end, and the last state."""
    ys = []
    for piece in pieces:
        y, state = mixer.prefill(piece, state)
        ys.append(y)
    return torch.cat(ys, 1), state


def in_steps(mixer: Mixer, x: Tensor, state: State) -> tuple[Tensor, State]:
    """Outputs of one step a token, and the last state."""
    ys = []
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t : t + 1], state)
        ys.append(y)
    return torch.cat(ys, 1), state


def learns(mixer: Mixer, name: str) -> bool:
    """Whether outputs have a gradient for this parameter."""
    return name.partition(".")[0] not in mixer.no_gradient


def title(law: Law) -> str:
    """The law in words: the first line of its docstring."""
    return (law.__doc__ or law.__name__).strip().splitlines()[0].rstrip(".")


def judge(law: Law, cls: type[Mixer]) -> str | None:
    """None when the law holds, else what is wrong, in one line."""
    try:
        law(Subject(cls))
    except Exception as error:  # a law may fail in any way its mixer fails
        said = " ".join(str(error).split())
        return f"{type(error).__name__}: {said[:300]}"
    return None
