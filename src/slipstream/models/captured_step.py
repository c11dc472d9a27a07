"""A model's step as a recording of itself: the same calls in the same memory, without the program around them.

    step = CapturedStep(model)
    logits, state = step(tokens, state)        # as model.step; room for the token is made

The first call of a shape runs the model's own step and records it (see ops/tape.py), so there is no second form of any mixer.
Where a step cannot be recorded, the model's own runs every time, and `why_not` says what stood in the way. Weights are read
where they lie, but what was computed from them alone is kept: after training on, make another.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.state import State
from slipstream.models.language_model import LanguageModel
from slipstream.ops.tape import Tape, record

ENDLESS = 2**62  # tokens that a state has room for which does not grow


class CapturedStep:
    """Without gradients; recorded on a CPU. It keeps one state, in memory of its own."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.why_not = model, ""
        self._state: State | None = None  # where the tape reads and writes
        self._room = 0  # tokens more that it holds
        self._tape, self._tokens, self._logits = Tape(), torch.empty(0), torch.empty(0)
        self._new: list[tuple[Tensor, Tensor]] = []  # a tensor of the state, and what the tape makes for its place

    @torch.no_grad()
    def __call__(self, tokens: Int[Tensor, "B 1"], state: State) -> tuple[Float[Tensor, "B 1 V"], State]:
        """As model.step. The state it gives is the one it keeps: hand it back, or take a clone."""
        if self.why_not or not tokens.is_cpu:
            return self.model.step(tokens, self.model.reserve(state, 1))
        if state is not self._state or self._room < 1:
            state = self.model.reserve(state, 1)
            self._room = self._room_of(state)
            if self._state is None or not _alike(state, self._state):
                return self._recorded(tokens, state)
            for old, new in zip(_tensors(self._state), _tensors(state)):
                old.copy_(new)
        self._tokens.copy_(tokens)
        self._tape.run()
        return self._after()

    def _recorded(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """The step as the model does it, on copies that the tape goes on with."""
        self._tokens, state = tokens.clone(), state.clone()

        def step() -> tuple[Tensor, dict[str, Tensor], Tensor]:
            logits, new = self.model.step(self._tokens, state)
            return logits, new.slots, new.length

        (self._logits, *parts), self._tape = record(step, [self._tokens, *_tensors(state)])
        new = State(*parts)
        self._new = [(old, made) for old, made in zip(_tensors(state), _tensors(new)) if made is not old]
        self.why_not = self._tape.refused or _why_not(state, new)
        if self.why_not:
            self._state, self._tape, self._new = None, Tape(), []
            return self._logits, new
        self._state = state
        return self._after()

    def _after(self) -> tuple[Tensor, State]:
        """What was made moves to where the next step reads it."""
        assert self._state is not None, "a step was recorded"
        self._room -= 1
        if self._new:
            torch._foreach_copy_([old for old, _ in self._new], [made for _, made in self._new])
        return self._logits.clone(), self._state

    def _room_of(self, state: State) -> int:
        ends = [
            slot.every * state[f"{place.at}.{name}"].shape[1]
            for place in self.model.stack.places()
            for name, slot in place.mixer.slots().items()
            if slot.grows
        ]
        return min(ends) - int(state.length.max()) if ends else ENDLESS


def _tensors(state: State) -> list[Tensor]:
    """All of a state, in the order of their names."""
    return [*(state.slots[name] for name in sorted(state.slots)), state.length]


def _alike(a: State, b: State) -> bool:
    """Whether one fits into the other's memory."""
    described = [[(t.shape, t.dtype, t.device) for t in _tensors(s)] for s in (a, b)]
    return a.slots.keys() == b.slots.keys() and described[0] == described[1]


def _why_not(old: State, new: State) -> str:
    """What would keep a step's state from taking the place of the one before."""
    if not _alike(old, new):
        return "the state changes its shape from token to token"
    memory = {t.untyped_storage().data_ptr() for t in _tensors(old)}
    pairs = zip(_tensors(old), _tensors(new))
    if any(made is not kept and made.untyped_storage().data_ptr() in memory for kept, made in pairs):
        return "the state is made of other parts of itself"
    return ""
