"""What attention inside buckets shares: projections that a choice hangs on, and rings of what can still be read as slots."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.ops.bucket_attention import EMPTY, Rings


def chosen_heads(proj: Linear, x: Float[Tensor, "B T D"], n_heads: int) -> Float[Tensor, "B T H K"]:
    """A projection by heads, in float32 at least: in bfloat16 rounding would move tokens to other buckets."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), proj.weight.to(wide)).unflatten(-1, (n_heads, -1))


def ring_slots(n_heads: int, rounds: int, n_buckets: int, window: int, head_dim: int) -> dict[str, Slot]:
    """The last `window` tokens of each bucket in each round, whatever the length."""
    dims = (n_heads, rounds, n_buckets * window)
    kept = Slot((*dims, head_dim), dtype=None)
    return {"k": kept, "v": kept, "code": Slot((*dims, rounds), torch.float64, start=EMPTY)}


def rings_of(state: State) -> Rings:
    return Rings(*(state[name] for name in Rings._fields))
