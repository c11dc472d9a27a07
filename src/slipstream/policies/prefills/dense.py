"""Every token of a prompt reads all before it, or all of the prompt too where the mixer is not causal."""

from __future__ import annotations

from torch import Tensor

from slipstream.ops.attention import attention
from slipstream.ops.softmax import Softmax
from slipstream.policies.policy import PrefillPolicy, no_argument


class Dense(PrefillPolicy, name="dense"):
    paper = "none: this is attention"

    def __init__(self, causal: bool) -> None:
        self.causal = causal

    @classmethod
    def read_argument(cls, argument: str | None, causal: bool) -> Dense:
        no_argument("dense", argument)
        return cls(causal)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: Tensor, lengths: Tensor | None, softmax: Softmax) -> Tensor:
        return attention(q, k, v, past, self.causal, lengths, softmax)
