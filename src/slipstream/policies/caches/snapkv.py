"""SnapKV: the end of a prompt votes on what of the prompt is kept.

At the end of every prefill, the queries among the last 32 tokens vote: a token's votes are the attention that they give it,
and through a max pool over 7 tokens its neighbours share them, so that what is found is found whole. Each key head keeps
the N tokens of most votes, and the last 32. What is generated afterwards is appended; only when it has filled the R places
that are there for it and for the last 32 does the oldest of it give way, and what was voted for never does.

Window and pool are those of the authors' LongBench settings; the votes of the query heads that one key head serves are summed.
A prompt that comes in pieces is voted on after every piece, over what the pieces before it have left: the end of a piece
then decides, which need not ask what the end of the prompt will ask. Pieces as long as the prompt are the paper's rule.

Lost: what the end of the prompt does not ask for. A later question about something else finds it gone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.core.state import Slot, State
from slipstream.ops.softmax import Softmax, with_sinks
from slipstream.policies.entries import FREE, Entries, Line, entry_slots, line_of, read_one, replaced
from slipstream.policies.policy import CachePolicy, KVHeads, Reading, whole_number
from slipstream.policies.votes import votes

VOTERS, POOL = 32, 7


class SnapKV(CachePolicy, name="snapkv"):
    paper = "Li et al. 2024, arXiv:2404.14469, sec. 4; pooling and window as in the authors' LongBench settings"
    takes = "N or N:R: tokens of a prompt that are voted for (default 512), and last tokens (default 256, at least 32)"

    def __init__(self, kv: KVHeads, chosen: int, last: int) -> None:
        super().__init__(kv)
        self.chosen, self.last = chosen, last

    @classmethod
    def read_argument(cls, argument: str | None, kv: KVHeads) -> SnapKV:
        chosen, colon, last = (argument or "512").partition(":")
        if argument == "" or ":" in last:
            raise InputError(f"the policy snapkv takes N or N:R, as snapkv:512:256; got {argument!r}")
        return cls(
            kv, whole_number("snapkv", chosen, 512), whole_number("snapkv:N", last if colon else None, 256, VOTERS)
        )

    def slots(self) -> dict[str, Slot]:
        return entry_slots(self.kv, self.chosen + self.last, voted=torch.uint8)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, state: State, lengths: Tensor | None, how: Reading):
        entries = {n: state[n] for n in self.slots()}
        line = line_of({n: x for n, x in entries.items() if n != "voted"}, {"k": k, "v": v}, state.length, lengths)
        kept = self._voted_for(q, line, how.softmax)
        came = line.held > line.kept  # rows that nothing was added to stay as they are, what was generated included
        kept = {n: torch.where(came.reshape(-1, *[1] * (x.ndim - 1)), kept[n], x) for n, x in entries.items()}
        return line.read(q, lengths, how), kept

    def _voted_for(self, q: Float[Tensor, "B T H K"], line: Line, softmax: Softmax) -> Entries:
        earlier = line.places < (line.held - VOTERS)[:, None]
        chosen = line.best(self._votes(q, line, softmax), self.chosen, earlier)
        last = line.held[:, None] - VOTERS + torch.arange(self.last, device=q.device)
        last = last.masked_fill((last < 0) | (last >= line.held[:, None]), FREE)
        index = torch.cat([chosen, last[..., None].expand(-1, -1, chosen.shape[2])], 1)
        voted = torch.arange(index.shape[1], device=q.device) < self.chosen
        return line.taken(index) | {"voted": (voted[:, None] & (index >= 0)).to(torch.uint8)}

    def _votes(self, q: Float[Tensor, "B T H K"], line: Line, softmax: Softmax) -> Float[Tensor, "B S G"]:
        """Pooled. Those who vote count for nobody's neighbour."""
        voters, ends = _last(q, line.ends(q.shape[1]), line.held - line.kept)
        given = votes(voters, line.entries["k"], ends, softmax)
        given = given.masked_fill((line.places >= (line.held - VOTERS)[:, None])[..., None], 0)
        return F.max_pool1d(given.transpose(1, 2), POOL, 1, POOL // 2).transpose(1, 2)

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: State, how: Reading):
        entries, new = {n: state[n] for n in self.slots()}, {"k": k, "v": v}
        o, log_total = read_one(q, entries, new, how.softmax)
        worth = torch.where(entries["voted"] > 0, torch.inf, entries["at"].to(log_total.dtype))
        kept = replaced(entries, new | {"voted": entries["voted"].new_zeros(k.shape[:3])}, state.length, worth)
        return with_sinks(o, log_total, how.softmax), kept

    def keys_read(self, tokens: int) -> float:
        """After a prompt of so many."""
        return min(tokens, self.chosen + VOTERS) + 1.0


def _last(
    q: Float[Tensor, "B T H K"], ends: Int[Tensor, "B T"], lengths: Int[Tensor, "B"]
) -> tuple[Float[Tensor, "B W H K"], Int[Tensor, "B W"]]:
    """The last queries of each row and their ends; end 0 for those that it does not have."""
    place = lengths[:, None] - VOTERS + torch.arange(VOTERS, device=q.device)
    index, there = place.clamp(min=0, max=max(0, q.shape[1] - 1)), place >= 0
    if not q.shape[1]:
        return q, ends
    voters = q.gather(1, index[..., None, None].expand(-1, -1, *q.shape[2:]))
    return voters, torch.where(there, ends.gather(1, index), 0)
