r"""Next-token prediction.

    loss = - sum_t log softmax(logits_t)[token_{t+1}]

In nats, summed, computed in float32 at least. The whole (B T V) of logits is held: cut the batch (grad_accumulation)
for large vocabularies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from slipstream.core.objective import Loss, Objective


class NextToken(Objective):
    """Every token of a sequence but the first is predicted from those before it."""

    def loss(self, model: nn.Module, batch: Int[Tensor, "B L"], generator: torch.Generator | None = None) -> Loss:
        inputs, targets = batch[:, :-1], batch[:, 1:]
        logits = model(inputs)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return Loss(F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="sum"), targets.numel())
