"""H2O: half heavy hitters, half recent tokens. What has been attended to most so far is kept.

Every token collects the attention that it gets, its own included; each key head keeps the N / 2 tokens that have collected
most (of equal ones the earlier) and the last N / 2. What the query heads give that one key head serves is summed.

Lost: what nobody looked at while it was there. A fact that is asked about only much later has collected little by then.
Early tokens have had more time to collect than late ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.core.state import Slot, State
from slipstream.ops.softmax import with_sinks
from slipstream.policies.entries import entry_slots, line_of, read_one, replaced
from slipstream.policies.policy import CachePolicy, KVHeads, Reading, whole_number
from slipstream.policies.votes import votes, votes_of_one, with_sinks_counted


class H2O(CachePolicy, name="h2o"):
    paper = "Zhang et al. 2023, arXiv:2306.14048, algorithm 1"
    takes = "N: tokens that each key head keeps (default 512)"

    def __init__(self, kv: KVHeads, entries: int) -> None:
        super().__init__(kv)
        self.entries, self.recent = entries, entries - entries // 2

    @classmethod
    def read_argument(cls, argument: str | None, kv: KVHeads) -> H2O:
        return cls(kv, whole_number("h2o", argument, 512, least=2))

    def slots(self) -> dict[str, Slot]:
        return entry_slots(self.kv, self.entries, score=torch.float32)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, state: State, lengths: Tensor | None, how: Reading):
        new = {"k": k, "v": v, "score": state["score"].new_zeros(k.shape[:3])}
        line = line_of({n: state[n] for n in self.slots()}, new, state.length, lengths)
        o = line.read(q, lengths, how)
        score = line.entries["score"] + votes(q, line.entries["k"], line.ends(q.shape[1]), how.softmax)
        line.entries["score"] = score
        late = line.places >= (line.held - self.recent)[:, None]
        return o, line.taken(line.best(score.masked_fill(late[..., None], torch.inf), self.entries))

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: State, how: Reading):
        entries = {n: state[n] for n in self.slots()}
        o, log_total = read_one(q, entries, {"k": k, "v": v}, how.softmax)
        whole, at = with_sinks_counted(log_total, how.softmax), entries["at"]
        entries["score"] = entries["score"] + votes_of_one(q, entries["k"], whole, at >= 0, how.softmax)
        own = votes_of_one(q, k, whole, torch.ones_like(k[..., 0], dtype=torch.bool), how.softmax)
        late = at > (state.length - self.recent)[:, None, None]
        worth = entries["score"].masked_fill(late, torch.inf)
        kept = replaced(entries, {"k": k, "v": v, "score": own}, state.length, worth)
        return with_sinks(o, log_total, how.softmax), kept

    def keys_read(self, tokens: int) -> float:
        return min(tokens, self.entries) + 1.0
