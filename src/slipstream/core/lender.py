"""The contract of a mixer that hands what it made of these tokens to later layers, and may be handed that of an earlier one."""

from __future__ import annotations

from abc import abstractmethod

from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.documents import over_documents
from slipstream.core.mixer import Mixer
from slipstream.core.state import State

Lent = tuple[Tensor, ...]


class Lender(Mixer):
    """Abstract. What is lent is a subclass's matter: attention lends keys and values (after a prefill or step, those of all
    tokens so far), and with Config.own_kv false does with another's; RWKV-7 lends values, and with Config.value_residual
    true mixes them with its own. Who needs what another has runs only where it is handed that of its lender: a layer before
    it, of its class with the same settings.

    forward, prefill and step are those of a mixer by itself. Subclasses write share_prefill, which takes what is lent, or
    None, and gives what this layer lends; and of the others, which follow from it, those that they have a shorter way for.
    """

    @abstractmethod
    def share_prefill(
        self,
        x: Float[Tensor, "B T D"],
        state: State,
        lent: Lent | None = None,
        lengths: Int[Tensor, "B"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], State, Lent]:
        """Prefill."""

    def share_step(
        self, x: Float[Tensor, "B 1 D"], state: State, lent: Lent | None = None
    ) -> tuple[Float[Tensor, "B 1 D"], State, Lent]:
        """Step."""
        return self.share_prefill(x, state, lent)

    def share_fresh(
        self, x: Float[Tensor, "B T D"], lent: Lent | None = None, lengths: Int[Tensor, "B"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], Lent]:
        """Whole sequences."""
        y, _, own = self.share_prefill(x, self.init_state(x.shape[0]), lent, lengths)
        return y, own

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        return self.share_prefill(x, state, None, lengths)[:2]

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        return self.share_step(x, state)[:2]

    def share(
        self, x: Float[Tensor, "B T D"], packed: Int[Tensor, "N"] | None = None, lent: list[Lent] | None = None
    ) -> tuple[Float[Tensor, "B T D"], list[Lent]]:
        """Forward. Lent is one a group of documents, or one."""
        made: list[Lent] = []

        def rows(x: Tensor, lengths: Tensor | None = None) -> Tensor:
            y, own = self.share_fresh(x, lent[len(made)] if lent else None, lengths)
            made.append(own)
            return y

        return (rows(x) if packed is None else over_documents(rows, x, packed)), made
