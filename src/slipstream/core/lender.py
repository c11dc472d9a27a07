"""The contract of attention that can lend its keys and values to later layers, and do with those of an earlier one."""

from __future__ import annotations

from abc import abstractmethod

from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.documents import over_documents
from slipstream.core.mixer import Mixer
from slipstream.core.state import State

KV = tuple[Tensor, Tensor]


class Lender(Mixer):
    """Abstract. With Config.own_kv (a field of every such mixer) false, a mixer has no keys and values of its own, neither
    weights nor slots, and runs only where it is handed those of another, its lender: one of its class with the same settings.

    Whoever lends is called as ever. Subclasses write `attend` and `borrow`, beside what a mixer does by itself.
    """

    @abstractmethod
    def attend(
        self, x: Float[Tensor, "B T D"], kv: KV | None = None, lengths: Int[Tensor, "B"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], KV]:
        """Whole sequences, and the keys and values they read: their own when kv is None."""

    @abstractmethod
    def borrow(
        self, x: Float[Tensor, "B T D"], state: State, lender: State, lengths: Int[Tensor, "B"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """Prefill and step of a mixer without its own. lender: the state of its lender after these same tokens."""

    def share(
        self, x: Float[Tensor, "B T D"], packed: Int[Tensor, "N"] | None = None, lent: list[KV] | None = None
    ) -> tuple[Float[Tensor, "B T D"], list[KV]]:
        """As forward, with what it read, for others: a pair for every group of documents, or one. lent: such a list."""
        read: list[KV] = []

        def rows(x: Tensor, lengths: Tensor | None = None) -> Tensor:
            y, kv = self.attend(x, lent[len(read)] if lent else None, lengths)
            read.append(kv)
            return y

        return (rows(x) if packed is None else over_documents(rows, x, packed)), read

    def _from_fresh(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.attend(x, None, lengths)[0]
