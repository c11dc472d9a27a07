"""Which matrices of a model are kept in few bits, and putting them in its place.

Every projection, the head, and the embedding, which shares the packed matrix of a head that is tied to it. What is left as it
is: norms, convolutions, decay rates and all else that is no projection, so far also experts whose matrices are one tensor
(layers/experts.py); routers, where a small error chooses another expert; and matrices with fewer than 32 outputs or inputs,
which no step waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.layers.quantised_linear import QuantisedLinear
from slipstream.models.config import Quantisation
from slipstream.models.frontends import TokenEmbedding

FEWEST = 32  # outputs, and inputs
Make = Callable[[Tensor, Tensor | None], QuantisedLinear]  # of a weight and a bias


class QuantisedEmbedding(TokenEmbedding):
    """As a TokenEmbedding, but its rows are made of codes as they are looked up."""

    def __init__(self, plain: TokenEmbedding, matrix: QuantisedLinear) -> None:
        nn.Module.__init__(self)  # no matrix of torch's
        self.num_embeddings, self.embedding_dim, self.padding_idx = plain.num_embeddings, plain.embedding_dim, None
        self.scale, self.norm, self.matrix = plain.scale, plain.norm, matrix

    @property
    def weight(self) -> Float[Tensor, "V D"]:  # type: ignore[override]
        return self.matrix.weight

    def rows(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        return self.matrix.rows(tokens)


def matrices(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Projections to be quantised: their parent, their name in it, themselves. A shared one comes once for each place."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if isinstance(child, nn.Linear) and _is_wanted(name, child):
                yield parent, name, child


def _is_wanted(name: str, linear: nn.Linear) -> bool:
    large = min(linear.in_features, linear.out_features) >= FEWEST
    return large and "router" not in name and not isinstance(linear, QuantisedLinear)


def swap(model: nn.Module, make: Make, tied: bool) -> None:
    """Put what `make` gives in the place of every matrix of a LanguageModel. tied: its embedding is its head's matrix."""
    made: dict[int, QuantisedLinear] = {}
    for parent, name, linear in list(matrices(model)):
        if id(linear) not in made:
            made[id(linear)] = make(linear.weight, linear.bias)
        setattr(parent, name, made[id(linear)])
    embedding, head = model.get_submodule("embedding"), model.get_submodule("head.proj")
    if isinstance(head, QuantisedLinear) and isinstance(embedding, TokenEmbedding):
        model.add_module("embedding", QuantisedEmbedding(embedding, head if tied else make(embedding.weight, None)))


def empty(how: Quantisation) -> Make:
    """What gives a place for each matrix, for a checkpoint to fill."""

    def make(weight: Tensor, bias: Tensor | None) -> QuantisedLinear:
        new = QuantisedLinear(weight.shape[1], weight.shape[0], how.bits, how.group, bias is not None)
        return new.to(weight.device, weight.dtype)

    return make
