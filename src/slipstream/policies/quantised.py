r"""Keys and values in few bits: the whole of a cache, each number as a code between the least and the largest of its group.

    x ~ zero + scale * code        zero = min(group), scale = (max(group) - zero) / (2^bits - 1), code = round((x - zero) / scale)

Keys are grouped channel by channel over 32 tokens, since some of their channels are large in every token; values token by
token over 32 channels (or the whole head, where 32 does not divide it). A group of keys is closed when its 32 tokens have come:
those of the group that is open stay in full. Two codes of 4 bits share a byte.

What is read is made of the codes tile by tile. Only a prefill policy that is not dense, in a prompt that follows another, has the
keys and values of its layer laid out whole while it reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.core.state import Slot, State, grow
from slipstream.ops.attention import write_cache
from slipstream.ops.places import cut_out
from slipstream.ops.softmax import Softmax, merge, read_with_lse, with_sinks
from slipstream.policies.policy import CachePolicy, KVHeads, Reading, no_argument

GROUP = 32  # tokens of a group of keys, channels of a group of values
QUERIES, TILE = 256, 32  # queries, and groups of tokens, that are read at once
Codes = tuple[UInt8[Tensor, "..."], Tensor, Tensor]  # codes, scale, zero


class Quantised(CachePolicy):
    """Abstract: a policy says in how many bits."""

    bits: ClassVar[int]

    @classmethod
    def read_argument(cls, argument: str | None, kv: KVHeads) -> Quantised:
        no_argument(cls.name, argument)
        for width in (kv.k_head_dim, kv.v_head_dim):
            if width * cls.bits % 8:
                raise InputError(
                    f"the policy {cls.name} puts two numbers in a byte; a head {width} wide has an odd one over"
                )
        return cls(kv)

    def slots(self) -> dict[str, Slot]:
        """A growing entry is a group of tokens."""
        kv, G = self.kv, self.kv.n_kv_heads
        dims = {
            "k_codes": (GROUP, G, kv.k_head_dim * self.bits // 8), "k_scale": (G, kv.k_head_dim), "k_zero": (G, kv.k_head_dim),
            "v_codes": (GROUP, G, kv.v_head_dim * self.bits // 8),
        }  # fmt: skip
        dims |= dict.fromkeys(("v_scale", "v_zero"), (GROUP, G, kv.v_head_dim // self._channels))
        closed = {
            n: Slot((0, *d), dtype=torch.uint8 if n.endswith("codes") else None, grows=True, every=GROUP)
            for n, d in dims.items()
        }
        return closed | kv.slots(GROUP)

    @property
    def _channels(self) -> int:
        """Of a group of values."""
        return GROUP if self.kv.v_head_dim % GROUP == 0 else self.kv.v_head_dim

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, state: State, lengths: Tensor | None, how: Reading):
        past, tokens = state.length, q.shape[1]
        whole = -(-(GROUP + tokens) // GROUP) * GROUP
        line = Pair(*(write_cache(grow(state[n], whole), x, past % GROUP, lengths) for n, x in (("k", k), ("v", v))))
        o = self._read(q, line, state, lengths, how)
        length = past + (tokens if lengths is None else lengths)
        closed = length // GROUP - past // GROUP
        row, group = (torch.arange(whole // GROUP, device=q.device) < closed[:, None]).nonzero(as_tuple=True)
        made = {n: x[row, group] for n, x in self._coded(line).items()}
        kept = {n: state[n].index_put_((row, (past // GROUP)[row] + group), x) for n, x in made.items()}
        return o, kept | {n: cut_out(x, closed * GROUP, GROUP) for n, x in line._asdict().items()}

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: State, how: Reading):
        """The open group is coded at every token, and what is made of it counts when it is closed: no branch."""
        past, row = state.length, torch.arange(len(q), device=q.device)
        opened = Pair(*(write_cache(state[n], x, past % GROUP) for n, x in (("k", k), ("v", v))))
        made = {n: x[:, 0] for n, x in self._coded(opened).items()}
        kept = {n: state[n].index_put_((row, past // GROUP), x) for n, x in made.items()}
        parts = [read_with_lse(q, *opened, _before(past % GROUP + 1, GROUP), how.softmax)]
        parts += self._closed(q, kept, past // GROUP, how.softmax)
        return with_sinks(*merge(parts), how.softmax), kept | opened._asdict()

    def keys_read(self, tokens: int) -> float:
        return tokens + 1.0

    def _read(
        self, q: Tensor, line: Pair, state: State, lengths: Tensor | None, how: Reading
    ) -> Float[Tensor, "B T H V"]:
        """New tokens read the closed groups and, in full, the open one and one another. line: from where the open one begins."""
        past, groups = state.length, state.length // GROUP
        if not len(q) or not int(groups.max()):
            return how.prompt.attend(q, *line, past % GROUP, lengths, how.softmax)
        if how.prompt.name != "dense":
            k, v = (self._laid_out(state, n, x, groups) for n, x in line._asdict().items())
            return how.prompt.attend(q, k, v, past, lengths, how.softmax)
        outputs = [line.v.new_zeros(len(q), 0, q.shape[2], line.v.shape[3])]
        for i in range(0, q.shape[1], QUERIES):
            rows = q[:, i : i + QUERIES]
            own = past[:, None] % GROUP + torch.arange(i, i + rows.shape[1], device=q.device)
            parts = [*self._closed(rows, state.slots, groups, how.softmax), *_opened(rows, line, own + 1, how.softmax)]
            outputs.append(with_sinks(*merge(parts), how.softmax))
        return torch.cat(outputs, 1)

    def _closed(
        self, q: Tensor, slots: dict[str, Tensor], groups: Int[Tensor, "B"], softmax: Softmax
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What is read in the first so many groups of each row, part by part."""
        room = slots["k_codes"].shape[1]
        if not torch.compiler.is_compiling():  # reading only what is filled costs a synchronisation
            room = int(groups.max()) if len(groups) else 0
        for i in range(0, room, TILE):
            tile = Pair(*(self._decoded(slots, n, slice(i, min(i + TILE, room))) for n in "kv"))
            yield read_with_lse(q, *tile, _before((groups - i) * GROUP, tile.k.shape[1]), softmax)

    def _laid_out(self, state: State, name: str, line: Tensor, groups: Int[Tensor, "B"]) -> Shaped[Tensor, "B S G _"]:
        decoded = self._decoded(state.slots, name, slice(None))
        room = int(groups.max()) * GROUP + line.shape[1]
        return write_cache(grow(decoded, room), line, groups * GROUP)

    def _coded(self, line: Pair) -> dict[str, Tensor]:
        """All groups of a line (B L G K), as the slots have them (B L/32 32 G ...)."""
        k, v = (x.unflatten(1, (-1, GROUP)) for x in line)
        k_codes, k_scale, k_zero = _codes(k, 2, self.bits)
        v_codes, v_scale, v_zero = _codes(v.unflatten(4, (-1, self._channels)), 5, self.bits)
        coded = {"k_codes": k_codes, "k_scale": k_scale.squeeze(2), "k_zero": k_zero.squeeze(2)}
        coded |= {"v_codes": v_codes.flatten(4), "v_scale": v_scale.squeeze(5), "v_zero": v_zero.squeeze(5)}
        return coded | {n: packed(coded[n], self.bits) for n in ("k_codes", "v_codes")}

    def _decoded(self, slots: dict[str, Tensor], name: str, tile: slice) -> Float[Tensor, "B S G _"]:
        """Keys or values of some groups of tokens."""
        codes, scale, zero = (slots[f"{name}_{part}"][:, tile] for part in ("codes", "scale", "zero"))
        codes = unpacked(codes, self.bits)
        if name == "k":
            return (codes * scale[:, :, None] + zero[:, :, None]).flatten(1, 2)
        values = codes.unflatten(4, (-1, self._channels)) * scale[..., None] + zero[..., None]
        return values.flatten(4).flatten(1, 2)


class Pair(NamedTuple):
    """Keys and values of the same tokens."""

    k: Float[Tensor, "B S G K"]
    v: Float[Tensor, "B S G V"]


def packed(codes: UInt8[Tensor, "*R K"], bits: int) -> UInt8[Tensor, "*R _"]:
    """Codes of 4 bits two to a byte: the even channel below."""
    return codes if bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4


def unpacked(codes: UInt8[Tensor, "*R _"], bits: int) -> UInt8[Tensor, "*R K"]:
    return codes if bits == 8 else torch.stack([codes & 15, codes >> 4], -1).flatten(-2)


def _codes(x: Tensor, dim: int, bits: int) -> Codes:
    """Codes are rounded against scale and zero as they are stored."""
    x, steps = x.detach(), 2**bits - 1
    zero = x.amin(dim, keepdim=True)
    scale = (x.amax(dim, keepdim=True) - zero) / steps
    code = (x - zero) / torch.where(scale > 0, scale, 1)
    return code.round().clamp(0, steps).to(torch.uint8), scale, zero


def _opened(q: Tensor, line: Pair, ends: Int[Tensor, "B T"], softmax: Softmax) -> Iterator[tuple[Tensor, Tensor]]:
    """What queries read of a line before their ends, part by part."""
    for i in range(0, int(ends.max()), TILE * GROUP):
        tile = Pair(*(x[:, i : i + TILE * GROUP] for x in line))
        places = torch.arange(i, i + tile.k.shape[1], device=q.device)
        yield read_with_lse(q, *tile, (places < ends[..., None])[:, None], softmax)


def _before(end: Int[Tensor, "B"], keys: int) -> Tensor:
    return (torch.arange(keys, device=end.device) < end[:, None])[:, None, None]
