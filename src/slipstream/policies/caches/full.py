"""Everything is kept, and every query reads all of it: attention as it was trained. Exact at any cut."""

from __future__ import annotations

from torch import Tensor

from slipstream.core.state import Slot, State
from slipstream.ops.attention import attention, write_cache
from slipstream.policies.policy import CachePolicy, KVHeads, Reading, no_argument


class Full(CachePolicy, name="full"):
    paper = "none: this is the cache of every decoder"

    @classmethod
    def read_argument(cls, argument: str | None, kv: KVHeads) -> Full:
        no_argument("full", argument)
        return cls(kv)

    def slots(self) -> dict[str, Slot]:
        return self.kv.slots(0, grows=True)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, state: State, lengths: Tensor | None, how: Reading):
        k, v = write_cache(state["k"], k, state.length, lengths), write_cache(state["v"], v, state.length, lengths)
        return how.prompt.attend(q, k, v, state.length, lengths, how.softmax), {"k": k, "v": v}

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: State, how: Reading):
        k, v = write_cache(state["k"], k, state.length), write_cache(state["v"], v, state.length)
        return attention(q, k, v, state.length, softmax=how.softmax), {"k": k, "v": v}

    def keys_read(self, tokens: int) -> float:
        return tokens + 1.0
