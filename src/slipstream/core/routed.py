"""The contract of a feed-forward of experts: every token by itself, in whole sequences or in single steps."""

from __future__ import annotations

from abc import abstractmethod

from jaxtyping import Float
from torch import Tensor

from slipstream.core.auxiliary import Router
from slipstream.core.per_token import PerToken
from slipstream.core.state import State


class RoutedPerToken(Router, PerToken):
    """Abstract: tells (core/auxiliary.py) what was chosen. Subclasses write `mix`, `penalty` and `reference`."""

    @abstractmethod
    def mix(self, x: Float[Tensor, "B T D"], few: bool) -> Float[Tensor, "B T D"]:
        """Every token by itself. few: so few that each reads its experts by itself, in static shapes."""

    def transform(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.mix(x, few=False)

    def step(self, x: Float[Tensor, "B 1 D"], state: State) -> tuple[Float[Tensor, "B 1 D"], State]:
        return self.mix(x, few=True), state.advance(1)
