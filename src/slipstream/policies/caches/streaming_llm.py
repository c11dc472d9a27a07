"""StreamingLLM: the first four tokens and the last W. Positions are counted inside the cache.

A softmax puts what it does not need on the first tokens of a text (attention sinks); without them a window alone falls apart.
The stored keys are turned to their own positions, so the sinks are turned on by the number of tokens that are gone, and
stand right before the window as they do in a text that was never cut. Memory does not grow, and texts may be endless.

Lost: all between the sinks and the window. Nothing that stood there can be found again.
"""

from __future__ import annotations

from torch import Tensor

from slipstream.core.state import Slot, State
from slipstream.policies.policy import CachePolicy, KVHeads, Reading, whole_number
from slipstream.policies.rings import Ring


class StreamingLLM(CachePolicy, name="streaming_llm"):
    paper = "Xiao et al. 2023, arXiv:2309.17453, sec. 3.2"
    takes = "W: last tokens that are kept beside the first four (default 1024)"

    def __init__(self, kv: KVHeads, window: int) -> None:
        super().__init__(kv)
        self.ring = Ring(window)

    @classmethod
    def read_argument(cls, argument: str | None, kv: KVHeads) -> StreamingLLM:
        return cls(kv, whole_number("streaming_llm", argument, 1024))

    def slots(self) -> dict[str, Slot]:
        return self.kv.slots(self.ring.size)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, state: State, lengths: Tensor | None, how: Reading):
        o, (k, v) = self.ring.prefill(q, k, v, (state["k"], state["v"]), state.length, lengths, how)
        return o, {"k": k, "v": v}

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: State, how: Reading):
        o, (k, v) = self.ring.step(q, k, v, (state["k"], state["v"]), state.length, how)
        return o, {"k": k, "v": v}

    def keys_read(self, tokens: int) -> float:
        return min(tokens, self.ring.size) + 1.0
