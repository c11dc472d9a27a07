r"""Mixture of depths: a layer that only some tokens pass; the others go round it, unread and unchanged.

    y_t = r_t f(x)_t where r_t > 1/2, else 0        r_t = sigmoid(w . x_t + b)        f reads the tokens that pass, and no other

Raposo et al. 2024, arXiv:2404.02258. There the tokens of largest r in a sequence pass, so many of each, which sees the future,
and to sample a predictor or r > 1/2 stands in for that. Here r > 1/2 decides always, by the token alone: trained and used it
is one function, any cut of a text the same. The loss that teaches their router is what holds the number: the cross-entropy of r
with being among the share `capacity` of the sequence where r is largest, heard by a trainer alone; in the first steps none pass,
until the router can tell tokens apart. A layer here is one mixer, with a router of its own; a block of theirs has one. Positions
count the tokens that passed. Whether any token passes is asked of the host, also in a step, which is what makes it quick.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from slipstream.core.auxiliary import Router, Told, tell
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.ops.route import best, router_logits
from slipstream.ops.valid import valid_mask

PASSED = "passed"  # tokens that the mixer inside has seen
LOSS = 0.1  # weight of the router's


class Skipping(Router, Mixer):
    """A mixer that is read by the tokens its router lets pass. capacity: the share of them that it is taught."""

    n_choices = 2  # passing, and going round

    def __init__(self, mixer: Mixer, capacity: float) -> None:
        super().__init__(mixer.config)
        self.mixer, self.capacity = mixer, capacity
        self.name, self.family, self.limits = mixer.name, mixer.family, mixer.limits  # type: ignore[misc]
        self.no_weight_decay = mixer.no_weight_decay  # type: ignore[misc]
        self.router = Linear(mixer.config.d_model, 1)
        nn.init.normal_(self.router.weight, std=0.02)
        nn.init.zeros_(self.router.bias)

    def slots(self) -> dict[str, Slot]:
        return {**self.mixer.slots(), PASSED: Slot((), dtype=torch.int64)}

    def _from_fresh(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        passing, r = self._passing(x, lengths)
        rows, place, counts = _those(x, passing)
        if not rows.shape[1]:
            return torch.zeros_like(x)
        return _back(self.mixer._from_fresh(rows, counts), place, passing, r)

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        passing, r = self._passing(x, lengths)
        rows, place, counts = _those(x, passing)
        tokens = x.shape[1] if lengths is None else lengths
        if not rows.shape[1]:
            return torch.zeros_like(x), state.advance(tokens)
        y, inner = self.mixer.prefill(rows, self._inner(state), counts)
        return _back(y, place, passing, r), state.advance(tokens, **inner.slots, **{PASSED: inner.length})

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        logits = router_logits(x, self.router.weight, self.router.bias)
        if not bool((logits > 0).all()):
            return self.prefill(x, state)
        y, inner = self.mixer.step(x, self._inner(state))
        return logits.sigmoid().to(y.dtype) * y, state.advance(1, **inner.slots, **{PASSED: inner.length})

    def _inner(self, state: State) -> State:
        return State({n: t for n, t in state.slots.items() if n != PASSED}, state[PASSED])

    def _passing(self, x: Tensor, lengths: Tensor | None) -> tuple[Bool[Tensor, "B T"], Float[Tensor, "B T 1"]]:
        logits = router_logits(x, self.router.weight, self.router.bias)
        passing = logits[..., 0] > 0
        if lengths is not None:
            passing = passing & valid_mask(lengths, x.shape[1])
        tell(self, logits, (~passing).long()[..., None])
        return passing, logits.sigmoid().to(x.dtype)

    def penalty(self, told: Told, load: Int[Tensor, "E"]) -> Float[Tensor, ""]:
        """The router is to know by a token alone whether it is among the best of its row."""
        assert told.logits is not None
        logits = told.logits[..., 0]
        most = best(logits.detach(), max(1, round(self.capacity * logits.shape[1])))
        return LOSS * F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits).scatter(1, most, 1.0))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Row by row: the tokens that pass, as a sequence of their own."""
        y = torch.zeros_like(x)
        for b, r in enumerate(self.router(x)[..., 0].sigmoid()):
            if (r > 0.5).any():
                y[b, r > 0.5] = r[r > 0.5, None] * self.mixer.reference(x[b : b + 1, r > 0.5])[0]
        return y

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        """At most: of all tokens."""
        return self.mixer.op_flops(T, B, mode)

    def idle_parameters(self, tokens: int = 1) -> int:
        return self.mixer.idle_parameters(tokens)


def _those(x: Tensor, passing: Tensor) -> tuple[Float[Tensor, "B S D"], Int[Tensor, "B S"], Int[Tensor, "B"]]:
    """The tokens that pass as right-padded rows, where they stood, and how many a row has."""
    counts = passing.sum(1)
    most = int(counts.max()) if len(counts) else 0
    place = passing.logical_not().long().sort(dim=1, stable=True).indices[:, :most]
    return x.gather(1, place[..., None].expand(-1, -1, x.shape[2])), place, counts


def _back(y: Tensor, place: Tensor, passing: Tensor, r: Tensor) -> Float[Tensor, "B T D"]:
    """Outputs where their tokens stood, weighed; zero where none passed."""
    out = y.new_zeros(*passing.shape, y.shape[2]).scatter(1, place[..., None].expand_as(y), y)
    return torch.where(passing[..., None], r * out, 0.0)
