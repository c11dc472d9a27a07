"""DuoAttention: a few heads find things again and keep everything; the others keep the first four tokens and the last W.

Which key heads retrieve is a property of the trained model, found once on texts (slipstream.models.retrieval_heads). Keys
stand at their own positions in both kinds of head. In one call the tokens of a prompt see one another in all heads; what the
streaming heads have let go is lost to the next call.

Lost: what lies between, for the streaming heads. Memory still grows, by the retrieval heads' share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.core.state import Slot, State
from slipstream.policies.caches.full import Full
from slipstream.policies.caches.streaming_llm import StreamingLLM
from slipstream.policies.policy import CachePolicy, KVHeads, Reading, unturned, whole_number

NONE = "none"
Run = Callable[[CachePolicy, Tensor, Tensor, Tensor, State, Reading], tuple[Tensor, dict[str, Tensor]]]


class DuoAttention(CachePolicy, name="duo_attention"):
    paper = "Xiao et al. 2024, arXiv:2410.10819, sec. 2"
    takes = "W:HEADS: last tokens of streaming heads, and the key heads that keep everything, as 256:0+3, or 256:none"

    def __init__(self, kv: KVHeads, window: int, retrieval: list[int]) -> None:
        super().__init__(kv)
        streaming = [head for head in range(kv.n_kv_heads) if head not in retrieval]
        heads = {"retrieval": retrieval, "streaming": streaming}
        self.heads = {kind: numbers for kind, numbers in heads.items() if numbers}
        shares = {kind: replace(kv, n_kv_heads=len(numbers)) for kind, numbers in heads.items()}
        self.policies = {"retrieval": Full(shares["retrieval"]), "streaming": StreamingLLM(shares["streaming"], window)}

    @classmethod
    def read_argument(cls, argument: str | None, kv: KVHeads) -> DuoAttention:
        window, _, heads = (argument or "").partition(":")
        numbers = [] if heads == NONE else heads.split("+")
        if not all(n.isdecimal() for n in numbers):
            raise InputError(
                f"the policy duo_attention takes a window and the key heads that keep everything, as duo_attention:256:0+3 or "
                f"duo_attention:256:none; got {argument!r}"
            )
        retrieval = sorted({int(n) for n in numbers})
        if retrieval and retrieval[-1] >= kv.n_kv_heads:
            raise InputError(
                f"duo_attention:{argument} names key head {retrieval[-1]}; there are {kv.n_kv_heads}, from 0"
            )
        return cls(kv, whole_number("duo_attention", window, 256), retrieval)

    def slots(self) -> dict[str, Slot]:
        return {f"{kind}.{name}": slot for kind in self.heads for name, slot in self.policies[kind].slots().items()}

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, state: State, lengths: Tensor | None, how: Reading):
        def run(policy: CachePolicy, q: Tensor, k: Tensor, v: Tensor, state: State, how: Reading):
            return policy.prefill(q, k, v, state, lengths, how)

        return self._by_kind(run, q, k, v, state, how)

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: State, how: Reading):
        def run(policy: CachePolicy, q: Tensor, k: Tensor, v: Tensor, state: State, how: Reading):
            return policy.step(q, k, v, state, how)

        return self._by_kind(run, q, k, v, state, how)

    def _by_kind(self, run: Run, q: Tensor, k: Tensor, v: Tensor, state: State, how: Reading):
        """Each kind of head by its own policy, with the query heads that it serves."""
        grouped, outputs, slots = q.unflatten(2, (k.shape[2], -1)), [], {}
        for kind, heads in self.heads.items():
            policy, served = self.policies[kind], grouped[:, :, heads].flatten(2, 3)
            o, kept = run(policy, served, k[:, :, heads], v[:, :, heads], state.scope(kind), self._how(how, heads))
            outputs.append(o.unflatten(2, (len(heads), -1)))
            slots |= {f"{kind}.{name}": slot for name, slot in kept.items()}
        came = [head for heads in self.heads.values() for head in heads]
        back = [came.index(head) for head in range(k.shape[2])]
        return torch.cat(outputs, 2)[:, :, back].flatten(2, 3), slots

    def _how(self, how: Reading, heads: list[int]) -> Reading:
        """For some key heads; the paper leaves positions as they are."""
        softmax = how.softmax
        if softmax.sinks is not None:
            softmax = replace(softmax, sinks=softmax.sinks.unflatten(0, (self.kv.n_kv_heads, -1))[heads].flatten())
        return replace(how, softmax=softmax, turn=unturned)

    def keys_read(self, tokens: int) -> float:
        """On average over the heads."""
        return (
            sum(len(h) * self.policies[kind].keys_read(tokens) for kind, h in self.heads.items()) / self.kv.n_kv_heads
        )
