r"""The gate of SeerAttention-R: what a token asks for, and what a block of keys answers, to be compared before any is read.

    a_t = rope_t(W_a [q_t of all heads of a key head])
    b_i = rope_{iL}(W_b [max k_s, min k_s, mean k_s over the L tokens of block i])

Gao et al. 2025, arXiv:2506.08889, eq. 1. It sees queries and keys before their positions. It is trained by distillation
alone: what it keeps has no gradient, `answers` makes it again with one. The authors begin at random; here it begins as what
ranks blocks well untrained: the mean of the queries with the mean of the keys.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.state import Slot, State
from slipstream.layers.rope import partial_rope
from slipstream.ops.chosen_attention import block_sums
from slipstream.ops.valid import zero_padding


class HeadLinear(nn.Module):
    """A matrix a key head, on what stands side by side for it."""

    def __init__(self, weight: Float[Tensor, "I K"], n_kv_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.repeat(n_kv_heads, 1, 1))

    def forward(self, x: Float[Tensor, "B T G I"]) -> Float[Tensor, "B T G K"]:
        return torch.einsum("btgi,gik->btgk", x, self.weight)


class AttnGate(nn.Module):
    """Weights are named as in the authors' checkpoints, where that of q is (G H/G K K)."""

    def __init__(
        self, n_kv_heads: int, group: int, head_dim: int, block_size: int, rope_base: float | None, rope_fraction: float
    ) -> None:
        super().__init__()
        self.n_kv_heads, self.head_dim, self.block_size = n_kv_heads, head_dim, block_size
        self.rope_base, self.rope_fraction = rope_base, rope_fraction
        same, nothing = torch.eye(head_dim), torch.zeros(2 * head_dim, head_dim)
        self.attngate_linear_q = HeadLinear(same.repeat(group, 1) / group, n_kv_heads)
        self.attngate_linear_k = HeadLinear(torch.cat([nothing, same]), n_kv_heads)

    def slots(self) -> dict[str, Slot]:
        """For every block begun: the max of k and of -k, the sum of k, and b."""
        G, K, every = self.n_kv_heads, self.head_dim, self.block_size
        most = Slot((0, G, 2 * K), dtype=None, start=-torch.inf, grows=True, every=every)
        return {
            "k_most": most,
            "k_sum": Slot((0, G, K), grows=True, every=every),
            "k_gate": Slot((0, G, K), dtype=None, grows=True, every=every),
        }

    def ask(self, q: Float[Tensor, "B T H K"], positions: Int[Tensor, "B T"]) -> Float[Tensor, "B T G K"]:
        """a."""
        return self.turn(self.attngate_linear_q(q.unflatten(2, (self.n_kv_heads, -1)).flatten(3)), positions)

    def answer(self, pooled: Float[Tensor, "B N G P"], blocks: Int[Tensor, "B N"]) -> Float[Tensor, "B N G K"]:
        """b, of max, min and mean side by side."""
        return self.turn(self.attngate_linear_k(pooled), blocks * self.block_size)

    def turn(self, x: Float[Tensor, "B T H K"], positions: Int[Tensor, "B T"]) -> Float[Tensor, "B T H K"]:
        """Positions, as attention itself has them."""
        return partial_rope(x, positions, self.rope_base, self.rope_fraction) if self.rope_base else x

    @torch.no_grad()
    def write(
        self, k: Float[Tensor, "B T G K"], state: State, lengths: Int[Tensor, "B"] | None = None
    ) -> dict[str, Tensor]:
        """The slots with new tokens in them: b is made anew for the blocks that these touch, and is final once a block is full."""
        past, L, T = state.length, self.block_size, k.shape[1]
        ends = past + (T if lengths is None else lengths)
        place = past[:, None] + torch.arange(T, device=k.device)
        k_most = _with_most(state["k_most"], k, place // L, place < ends[:, None])
        k_sum = block_sums(state["k_sum"], zero_padding(k, lengths), past, L)
        begun = (past // L)[:, None] + torch.arange((T + L - 2) // L + 1 if T else 0, device=k.device)
        begun = begun.clamp(max=k_sum.shape[1] - 1)  # a row may have begun fewer than another: its last is made twice
        rows = torch.arange(len(past), device=k.device)[:, None]
        held = (ends[:, None] - begun * L).clamp(0, L)[..., None, None]
        b = self.answer(self._pooled(k_most[rows, begun], k_sum[rows, begun], held), begun)
        return {
            "k_most": k_most,
            "k_sum": k_sum,
            "k_gate": state["k_gate"].index_put_((rows, begun), b.to(k_most.dtype)),
        }

    def answers(
        self, k_most: Float[Tensor, "B N G K2"], k_sum: Float[Tensor, "B N G K"], blocks: int
    ) -> Float[Tensor, "B n G K"]:
        """b of the first blocks, from what is kept of them; of one that is not full in a row it means nothing."""
        L, number = self.block_size, torch.arange(blocks, device=k_sum.device).expand(len(k_sum), -1)
        begun = torch.isfinite(k_most[:, :blocks, :1, :1])
        return self.answer(self._pooled(k_most[:, :blocks], k_sum[:, :blocks], L * begun), number)

    def _pooled(self, k_most: Tensor, k_sum: Tensor, held: Int[Tensor, "B N 1 1"]) -> Float[Tensor, "B N G P"]:
        """Max, min and mean of blocks that hold so many tokens; zero of those that hold none."""
        high, low = k_most.split(self.head_dim, -1)
        mean = (k_sum / held.clamp(min=1)).to(high.dtype)
        return torch.where(held > 0, torch.cat([high, -low, mean], -1), 0)

    def flops(self, tokens: int, n_heads: int) -> float:
        """Of ask and of write."""
        touched = (tokens + self.block_size - 2) // self.block_size + 1
        return 2.0 * self.head_dim**2 * (tokens * n_heads + 3 * touched * self.n_kv_heads)


def _with_most(
    most: Float[Tensor, "B N G K2"], k: Float[Tensor, "B T G K"], block: Int[Tensor, "B T"], real: Tensor
) -> Float[Tensor, "B N G K2"]:
    """The largest of k and of -k in each block, with new tokens in it. What was there is consumed."""
    new = torch.where(real[..., None, None], torch.cat([k, -k], -1), -torch.inf).to(most.dtype)
    return most.scatter_reduce_(1, block[..., None, None].expand(new.shape), new, "amax")
