"""Every r-th token of a sequence, for each head others: taken out as rows of their own, and put back."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def n_taken(T: int, rate: int) -> int:
    """How many places a row has for what is taken of T tokens."""
    return -(-T // rate)


class Strides:
    """Head group j of row b takes the tokens at positions j mod r, r + j mod r, ... of T that stand at past_b, past_b + 1, ...

    A row of its own for each row and group: `past` tokens were taken for it before, `lengths` are taken of these.
    """

    past: Int[Tensor, "BG"]
    lengths: Int[Tensor, "BG"]

    def __init__(
        self, rate: int, groups: int, past: Int[Tensor, "B"], T: int, lengths: Int[Tensor, "B"] | None
    ) -> None:
        offset = torch.arange(groups, device=past.device) % rate
        self.rate, self.T, self.groups = rate, T, groups
        self.skip = (offset - past[:, None]) % rate  # tokens before the first that is taken
        real = T if lengths is None else lengths[:, None]
        self.past = ((past[:, None] - offset + rate - 1) // rate).flatten()
        self.lengths = ((real - self.skip + rate - 1) // rate).clamp(min=0).flatten()

    def out_of(self, x: Float[Tensor, "B T H K"]) -> Float[Tensor, "BG n R K"]:
        """What is taken, heads by their groups; zeros where fewer are than there is room for."""
        place = self.skip[..., None] + self.rate * torch.arange(n_taken(self.T, self.rate), device=x.device)
        taken = _at(x.unflatten(2, (self.groups, -1)).transpose(1, 2), place.clamp(max=max(self.T - 1, 0))).flatten(
            0, 1
        )
        real = torch.arange(taken.shape[1], device=x.device) < self.lengths[:, None]
        return torch.where(real[..., None, None], taken, 0)

    def back(self, rows: Float[Tensor, "BG n R *V"], rest: float) -> Float[Tensor, "B T H *V"]:
        """Each taken token at its place, and `rest` at the others."""
        since = torch.arange(self.T, device=rows.device) - self.skip[..., None]
        x = _at(rows.unflatten(0, (-1, self.groups)), (since // self.rate).clamp(min=0))
        taken = (since >= 0) & (since % self.rate == 0)
        x = torch.where(taken.reshape(*taken.shape, *[1] * (x.ndim - 3)), x, rest)
        return x.transpose(1, 2).flatten(2, 3)


def _at(x: Tensor, place: Int[Tensor, "B G n"]) -> Tensor:
    """(B G T ...) at places of the third axis."""
    return x.gather(2, place.reshape(*place.shape, *[1] * (x.ndim - 3)).expand(-1, -1, -1, *x.shape[3:]))
