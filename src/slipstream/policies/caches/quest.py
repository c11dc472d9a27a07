r"""Quest: everything is kept, and a query reads only the pages that may hold a large product with it.

    score(page) = sum_i max(q_i min_i, q_i max_i)        min, max: of the page's keys, channel by channel

The score is an upper bound of q . k over the 16 keys of a page. One token reads its own page and the N / 16 of largest score
(of equal ones the earlier); the query heads that one key head serves read the same pages, those of the largest bound that any of
them has. Prompts are read by the prefill policy. The paper leaves its first two layers dense: a pattern can say so, or a
list of caches, one a layer.

Lost: nothing is gone, a later token may read what this one does not. Memory grows as ever, and by an eighth of the keys for
the bounds; what is saved is reading.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.state import Slot, State
from slipstream.ops.attention import write_cache
from slipstream.ops.chosen_attention import choose, gathered_tokens, tokens_of
from slipstream.ops.page_bounds import page_bounds
from slipstream.ops.valid import valid_mask
from slipstream.policies.policy import CachePolicy, KVHeads, Reading, whole_number

PAGE = 16  # tokens


class Quest(CachePolicy, name="quest"):
    paper = "Tang et al. 2024, arXiv:2406.10774, sec. 3"
    takes = "N: tokens that are read beside the page of the newest, in pages of 16 (default 512)"

    def __init__(self, kv: KVHeads, tokens: int) -> None:
        super().__init__(kv)
        self.pages = -(-tokens // PAGE)

    @classmethod
    def read_argument(cls, argument: str | None, kv: KVHeads) -> Quest:
        return cls(kv, whole_number("quest", argument, 512))

    def slots(self) -> dict[str, Slot]:
        bound = Slot((0, self.kv.n_kv_heads, self.kv.k_head_dim), dtype=None, grows=True, every=PAGE)
        return self.kv.slots(0, grows=True) | {"k_min": bound, "k_max": bound}

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, state: State, lengths: Tensor | None, how: Reading):
        kept = self._written(k, v, state, lengths)
        return how.prompt.attend(q, kept["k"], kept["v"], state.length, lengths, how.softmax), kept

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: State, how: Reading):
        kept, past = self._one_written(k, v, state), state.length[:, None]
        own, page = past // PAGE, torch.arange(kept["k_min"].shape[1], device=q.device)
        seen = (page <= own)[:, None, None]
        bounds = page_bounds(q, kept["k_min"], kept["k_max"]).masked_fill((page == own)[:, None], torch.inf)
        chosen = choose(bounds[:, None], seen, self.pages + 1)
        return gathered_tokens(q, kept["k"], kept["v"], tokens_of(chosen, PAGE, past), how.softmax), kept

    def _one_written(self, k: Tensor, v: Tensor, state: State) -> dict[str, Tensor]:
        """Only the bounds of the newest page move."""
        past, page = state.length, state.length // PAGE
        begins = (past % PAGE == 0)[:, None, None, None]
        own = {n: state[n].take_along_dim(page[:, None, None, None], 1) for n in ("k_min", "k_max")}
        low, high = torch.minimum(own["k_min"], k), torch.maximum(own["k_max"], k)
        return {
            "k": write_cache(state["k"], k, past),
            "v": write_cache(state["v"], v, past),
            "k_min": write_cache(state["k_min"], torch.where(begins, k, low), page),
            "k_max": write_cache(state["k_max"], torch.where(begins, k, high), page),
        }

    def _written(self, k: Tensor, v: Tensor, state: State, lengths: Tensor | None) -> dict[str, Tensor]:
        past = state.length
        return {
            "k": write_cache(state["k"], k, past, lengths),
            "v": write_cache(state["v"], v, past, lengths),
            "k_min": -_raised(-state["k_min"], -k, past, lengths),
            "k_max": _raised(state["k_max"], k, past, lengths),
        }

    def keys_read(self, tokens: int) -> float:
        """A bound is two vectors, and is read for every page."""
        return min(tokens, self.pages * PAGE + tokens % PAGE) + 1.0 + 2 * (tokens // PAGE + 1)


def _raised(
    largest: Float[Tensor, "B P G K"],
    k: Float[Tensor, "B T G K"],
    past: Int[Tensor, "B"],
    lengths: Int[Tensor, "B"] | None,
) -> Float[Tensor, "B P G K"]:
    """The largest of each page, with new keys. Pages that begin with them begin anew, whatever stands there; later ones hold 0."""
    first = torch.arange(largest.shape[1], device=k.device) * PAGE
    count = torch.full_like(past, k.shape[1]) if lengths is None else lengths
    raised = largest.masked_fill((first >= past[:, None])[..., None, None], -torch.inf)
    k = torch.where(valid_mask(count, k.shape[1])[..., None, None], k, -torch.inf)
    page = (past[:, None] + torch.arange(k.shape[1], device=k.device)) // PAGE
    raised = raised.scatter_reduce(1, page[..., None, None].expand_as(k), k, "amax")
    return raised.masked_fill((first >= (past + count)[:, None])[..., None, None], 0)
