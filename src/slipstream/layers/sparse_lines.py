"""What mixers with a cache of keys and values share: kept whole or as long as they are seen, and a read of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from slipstream.core.state import Slot, State
from slipstream.layers.grouped_qkv import GroupedQKV
from slipstream.ops.attention import window_attention, write_cache
from slipstream.ops.valid import last_tokens, zero_padding

Read = Callable[[Tensor, Tensor, Tensor], Float[Tensor, "B T H V"]]  # of q, and lines of k and v


def recent_slots(qkv: GroupedQKV, reach: int) -> dict[str, Slot]:
    """Keys and values of the last `reach` tokens."""
    line = Slot((reach, qkv.n_kv_heads, qkv.head_dim), dtype=None)
    return {"k": line, "v": line, **qkv.slots()}


def read_recent(
    qkv: GroupedQKV, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None, read: Read
) -> tuple[Float[Tensor, "B T H V"], State]:
    """Read lines of the kept tokens with the new ones behind them."""
    q, k, v, convs = qkv(x, state, lengths)
    reach = state["k"].shape[1]
    k, v = (torch.cat([state[n], zero_padding(new, lengths)], 1) for n, new in (("k", k), ("v", v)))
    o = read(q, k, v)
    k, v = (last_tokens(line, reach, lengths) for line in (k, v))
    return o, state.advance(x.shape[1] if lengths is None else lengths, k=k, v=v, **convs)


def read_window(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G K"],
    state: State,
    lengths: Int[Tensor, "B"] | None,
    window: int,
) -> tuple[Float[Tensor, "B T H K"], dict[str, Tensor]]:
    """Softmax over the last `window` tokens, where q, k and v are at hand, and the slots k and v after them."""
    recent = {n: torch.cat([state[n], zero_padding(t, lengths)], 1) for n, t in (("k", k), ("v", v))}
    o = window_attention(q, recent["k"], recent["v"], state.length, window)
    return o, {n: last_tokens(t, window - 1, lengths) for n, t in recent.items()}


def read_all(
    qkv: GroupedQKV, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None, read: Read
) -> tuple[Float[Tensor, "B T H V"], State]:
    """Read caches by position, which have room for the new tokens."""
    q, k, v, convs = qkv(x, state, lengths)
    k, v = write_cache(state["k"], k, state.length, lengths), write_cache(state["v"], v, state.length, lengths)
    return read(q, k, v), state.advance(x.shape[1] if lengths is None else lengths, k=k, v=v, **convs)


def first_tokens(
    kept: Shaped[Tensor, "B n *G"],
    new: Shaped[Tensor, "B T *G"],
    past: Int[Tensor, "B"],
    lengths: Int[Tensor, "B"] | None,
) -> Shaped[Tensor, "B n *G"]:
    """The first n tokens of rows, of which `kept` holds those before past."""
    n, count = kept.shape[1], new.shape[1] if lengths is None else lengths[:, None]
    place = torch.arange(n, device=past.device).expand(len(past), n)
    came = place - past[:, None]
    place = torch.where((came >= 0) & (came < count), n + came, place)
    line = torch.cat([kept, new.to(kept.dtype)], 1)
    return line.gather(1, place.reshape(*place.shape, *[1] * (line.ndim - 2)).expand(-1, -1, *line.shape[2:]))
