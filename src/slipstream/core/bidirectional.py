"""The contract of a mixer that needs the whole sequence before its first output: no state, no prefill, no step."""

from __future__ import annotations

from abc import abstractmethod

from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.cost import Cost
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State


class Bidirectional(Mixer):
    """Abstract: every token sees every other. Subclasses write `whole` and `reference`, and say why in `limits`."""

    @abstractmethod
    def whole(self, x: Float[Tensor, "B T D"], lengths: Int[Tensor, "B"] | None = None) -> Float[Tensor, "B T D"]:
        """All outputs at once. lengths: rows are right-padded; each is computed as if it were alone."""

    def slots(self) -> dict[str, Slot]:
        return {}

    def _from_fresh(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.whole(x, lengths)

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        raise InputError(f"{self.name} cannot go on from a state: {self.limits['prefill']}")

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        raise InputError(f"{self.name} cannot read one token: {self.limits['step']}")

    def cost(self, T: int, B: int = 1, mode: Mode = "forward") -> Cost:
        """One token more is everything anew."""
        return super().cost(T + 1 if mode == "step" else T, B, "forward")
