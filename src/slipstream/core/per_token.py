"""The contract of a feed-forward: no slots, so all three modes are one function of each token."""

from __future__ import annotations

from abc import abstractmethod

from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.mixer import Mixer
from slipstream.core.state import Slot, State


class PerToken(Mixer):
    """Abstract: a mixer that looks at one token at a time. Subclasses write `transform` and `reference`."""

    @abstractmethod
    def transform(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Every token by itself."""

    def slots(self) -> dict[str, Slot]:
        return {}

    def forward(self, x: Float[Tensor, "B T D"], packed: Int[Tensor, "N"] | None = None) -> Float[Tensor, "B T D"]:
        return self.transform(x)

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        return self.transform(x), state.advance(x.shape[1] if lengths is None else lengths)
