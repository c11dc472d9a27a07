r"""Stretches of tokens made one key, which is also the value, and the heads that read it (DeepSeek-V4).

    c_i = rope(norm(sum_j softmax_j(z_j + e_j) * u_j))        u = W_u x, z = W_z x, channel by channel, over m tokens

With overlap a stretch is 2 m tokens, the m before being seen by weights of their own: u, z and e are twice as wide, the first
half for what follows. Positions turn the last channels of a head; since values are turned too, outputs are turned back.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.state import Slot
from slipstream.layers.linear import Linear
from slipstream.layers.norm import RMSNorm
from slipstream.layers.rope import rope
from slipstream.ops.attention import write_cache
from slipstream.ops.compressed_attention import Stretch, stretches
from slipstream.ops.rms_norm import rms_norm
from slipstream.ops.softmax import Softmax
from slipstream.ops.valid import last_tokens, zero_padding


class CompressedConfig(MixerConfig):
    """Settings of mixers that read a window and what was compressed before it."""

    n_heads: int | None = None  # query heads, all on one key; default d_model / 64
    q_rank: int | None = None  # width of a latent that queries are made of; default none, they are made of x
    rope_head_dim: int | None = None  # channels of a head that positions turn; default half of them
    rope_base: float | None = 10000.0  # base of the rotary positions; None for no positions
    window: int = Field(128, ge=1)  # tokens seen as they are, the current one included


def turn_last(x: Float[Tensor, "B T H K"], positions: Int[Tensor, "B T"], width: int, base: float | None) -> Tensor:
    """The last channels of a head turned by positions, the others as they are."""
    if not base:
        return x
    return torch.cat([x[..., :-width], rope(x[..., -width:], positions, base)], -1)


class Compressor(nn.Module):
    """x -> one key for every `rate` tokens; its memory is the tokens of the stretch that has not ended, and the keys."""

    def __init__(self, d_model: int, width: int, rate: int, overlap: bool, turned: int, base: float | None) -> None:
        super().__init__()
        self.rate, self.width, self.turned, self.base, self.overlap = rate, width, turned, base, overlap
        self.length, wide = (2 * rate, 2 * width) if overlap else (rate, width)
        self.kv_proj, self.gate_proj = (Linear(d_model, wide, bias=False) for _ in range(2))
        self.position_bias = nn.Parameter(torch.zeros(rate, wide))
        self.kv_norm = RMSNorm(width)

    def slots(self) -> dict[str, Slot]:
        """What waits. Tokens before the first have no weight."""
        dims = (self.length - 1, self.kv_proj.out_features)
        return {"kv": Slot(dims, dtype=None), "gate": Slot(dims, dtype=None, start=-torch.inf)}

    def forward(
        self, x: Float[Tensor, "B T D"], before: dict[str, Tensor], past: Int[Tensor, "B"], lengths: Tensor | None
    ) -> dict[str, Tensor]:
        """The slots after this call; before: kv, gate, and the entries so far."""
        new = {"kv": self.kv_proj(x), "gate": self.gate_proj(x)}
        lines = {n: torch.cat([before[n], zero_padding(t, lengths)], 1) for n, t in new.items()}
        shifted = past + self.length - self.rate  # with overlap, the first stretch begins before the first token
        cut = [stretches(t[:, :, None], shifted, Stretch(self.length, self.rate), lengths) for t in lines.values()]
        (_, first, count), (kv, gate) = cut[0], (held[:, :, :, 0] for held, *_ in cut)
        positions = (first[:, None] + torch.arange(kv.shape[1], device=x.device)) * self.rate
        whole = torch.arange(kv.shape[1], device=x.device) < count[:, None]
        gate = torch.where(whole[..., None, None], gate, 0)  # what has not ended may hold no weight at all
        entries = write_cache(before["entries"], self.pooled(kv, gate, positions), first, count)
        return {n: last_tokens(line, self.length - 1, lengths) for n, line in lines.items()} | {"entries": entries}

    def pooled(
        self, kv: Float[Tensor, "B N l W"], gate: Float[Tensor, "B N l W"], positions: Int[Tensor, "B N"]
    ) -> Float[Tensor, "B N 1 K"]:
        """One key for each stretch."""
        gate = gate + self.position_bias.repeat(self.length // self.rate, 1)
        if self.overlap:
            kv, gate = (
                torch.cat([t[:, :, : self.rate, : self.width], t[:, :, self.rate :, self.width :]], 2)
                for t in (kv, gate)
            )
        weights = gate.to(torch.promote_types(gate.dtype, torch.float32)).softmax(2).to(kv.dtype)
        return turn_last(self.kv_norm((weights * kv).sum(2))[:, :, None], positions, self.turned, self.base)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B N 1 K"]:
        """Stretch by stretch."""
        kv, gate = self.kv_proj(x), self.gate_proj(x)
        bias, entries = self.position_bias.repeat(self.length // self.rate, 1), [x.new_zeros(len(x), 0, 1, self.width)]
        for i in range(x.shape[1] // self.rate):
            begin, end = i * self.rate, (i + 1) * self.rate
            parts = [(slice(begin, end), slice(-self.width, None), bias[-self.rate :])]
            if self.overlap and i:
                parts.insert(0, (slice(begin - self.rate, begin), slice(self.width), bias[: self.rate]))
            u = torch.cat([kv[:, tokens, half] for tokens, half, _ in parts], 1)
            z = torch.cat([gate[:, tokens, half] + e[:, half] for tokens, half, e in parts], 1)
            at = torch.full((len(x), 1), begin)
            c = self.kv_norm((z.softmax(1) * u).sum(1))[:, None, None]
            entries.append(turn_last(c, at, self.turned, self.base))
        return torch.cat(entries, 1)


class SharedKVHeads(nn.Module):
    """Query heads on one key that is also the value, with sinks; weights named as in DeepSeek-V4, o_proj one for its two."""

    def __init__(self, config: CompressedConfig) -> None:
        super().__init__()
        D, self.n_heads, self.base = config.d_model, heads(config.d_model, config.n_heads), config.rope_base
        self.head_dim = D // self.n_heads
        self.turned = config.rope_head_dim or max(2, self.head_dim // 4 * 2)
        if self.turned % 2 or self.turned > self.head_dim:
            raise InputError(f"rope_head_dim {self.turned} must be even, and at most the {self.head_dim} of a head")
        if config.q_rank:
            self.q_a_proj, self.q_a_norm = Linear(D, config.q_rank, bias=False), RMSNorm(config.q_rank)
        self.low_rank_q = bool(config.q_rank)
        self.q_b_proj = Linear(config.q_rank or D, D, bias=False)
        self.kv_proj, self.kv_norm = Linear(D, self.head_dim, bias=False), RMSNorm(self.head_dim)
        self.sinks = nn.Parameter(torch.zeros(self.n_heads))
        self.o_proj = Linear(D, D, bias=False)

    def low_rank(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T Q"]:
        """What queries are made of."""
        return self.q_a_norm(self.q_a_proj(x)) if self.low_rank_q else x

    def queries(self, low: Float[Tensor, "B T Q"], positions: Int[Tensor, "B T"]) -> Float[Tensor, "B T H K"]:
        return self._turn(rms_norm(self.q_b_proj(low).unflatten(-1, (self.n_heads, -1))), positions)

    def keys(self, x: Float[Tensor, "B T D"], positions: Int[Tensor, "B T"]) -> Float[Tensor, "B T 1 K"]:
        return self._turn(self.kv_norm(self.kv_proj(x))[:, :, None], positions)

    def output(self, o: Float[Tensor, "B T H K"], positions: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        return self.o_proj(self._turn(o, -positions).flatten(2))

    @property
    def softmax(self) -> Softmax:
        return Softmax(sinks=self.sinks)

    def _turn(self, t: Tensor, positions: Tensor) -> Tensor:
        return turn_last(t, positions, self.turned, self.base)

    def reference(
        self, q: Float[Tensor, "B T H K"], keys: Float[Tensor, "B T 1 K"], entries: Float[Tensor, "B N 1 K"],
        window: int, met: list[Int[Tensor, "B _"]],
    ) -> Float[Tensor, "B T H K"]:  # fmt: skip
        """Token by token: the window, and those entries of each row that token t meets."""
        outputs = []
        for t in range(q.shape[1]):
            far = torch.take_along_dim(entries, met[t][..., None, None], 1)
            seen = torch.cat([keys[:, max(0, t + 1 - window) : t + 1], far], 1)[:, :, 0]
            logits = torch.einsum("bhk,bsk->bhs", q[:, t], seen) / self.head_dim**0.5
            sinks = self.sinks.expand(len(q), -1)[..., None]
            weights = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
            outputs.append(torch.einsum("bhs,bsk->bhk", weights, seen))
        return torch.stack(outputs, 1)
