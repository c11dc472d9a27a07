r"""Mixture of sparse attention (MoSA): each head picks the tokens it wants from the whole sequence and attends among them.

    I_h = the n / sparsity tokens of largest r_t^h = sigmoid(w_r^h . x_t), at least two
    o_t^h = r_t^h softmax(q_t^h . k_s^h / sqrt(K)) v_s^h over s <= t in I_h, for t in I_h        o_t^h = 0 for other t
    y_t = sum_h W_o^h o_t^h + dense attention of n_dense_heads heads        q, k, v = W_q^h x, W_k^h x, W_v^h x

Only chosen tokens are projected; the dense heads beside are the paper's. Of equal tokens the first is picked. Whether a
token is chosen depends on those after it, and how many are chosen on the length: a language model trained so sees the future
through the choice, and decodes otherwise than it was trained. The authors' code has no other choice, so there is no prefill
and no step here, and a language model refuses it. Their local heads in place of dense ones are not here.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from slipstream.core.bidirectional import Bidirectional
from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mode
from slipstream.layers.linear import Linear
from slipstream.layers.rope import partial_rope
from slipstream.ops.attention import attention, attention_flops
from slipstream.ops.attention import reference as softmax_reference
from slipstream.ops.route import best, router_logits
from slipstream.ops.valid import valid_mask, zero_padding

WHY = "its heads choose their tokens from the whole sequence, those to come included"


class MoSA(Bidirectional, name="mosa", family="attention"):
    paper = "Piekos, Csordas, Schmidhuber 2025, arXiv:2505.00315, sec. 2; layer as in the authors' piotrpiekos/MoSA"
    use_when = "whole sequences are at hand, and some heads can do with the few tokens that matter to them"
    train_order, decode_order = "T^2", "T^2"
    symbols = {"k": "tokens / sparsity", "h": "d_model", "h'": "head_dim", "W^r": "router", "X_s": "chosen"}
    oracle = "the authors' MoSA in numpy, tests/oracles/attention_mixtures.npz"
    limits = {"prefill": WHY, "step": WHY}

    class Config(MixerConfig):
        n_heads: int | None = None  # heads in all; default d_model / 64, at least 4
        n_dense_heads: int | None = None  # of these, heads that attend to every token; default half
        sparsity: int = Field(16, ge=1)  # a head picks one token in so many
        include_first: bool = False  # every head has the first token among its own
        causal: bool = True  # chosen tokens see those before them; False: all that are chosen (encoders)
        rope_fraction: float = Field(0.5, ge=0, le=1)  # share of q's and k's channels that are turned by position
        rope_base: float = 10000.0  # base of the rotary positions

    config: Config
    tiny = Config(d_model=24, n_heads=4, n_dense_heads=1, sparsity=3, rope_fraction=0.7)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D, n_all = config.d_model, heads(config.d_model, config.n_heads, min(64, max(1, config.d_model // 4)))
        self.n_dense = n_all // 2 if config.n_dense_heads is None else config.n_dense_heads
        self.n_heads, self.head_dim = n_all - self.n_dense, D // n_all
        if not 0 <= self.n_dense < n_all:
            raise InputError(f"n_dense_heads {self.n_dense} must be from 0 to one less than n_heads {n_all}")
        if (turned := int(config.rope_fraction * self.head_dim)) % 2:
            raise InputError(
                f"rotary positions turn pairs: rope_fraction {config.rope_fraction:g} of head_dim {self.head_dim} is {turned}, "
                f"and must be even"
            )
        H, K = self.n_heads, self.head_dim
        self.router = Linear(D, H, bias=False)
        self.qkv_heads = nn.Parameter(torch.empty(H, 3 * K, D).uniform_(-((3 * K) ** -0.5), (3 * K) ** -0.5))
        self.o_heads = nn.Parameter(torch.empty(H, D, K).uniform_(-((D * H) ** -0.5), (D * H) ** -0.5))
        if self.n_dense:
            self.qkv_proj = Linear(D, 3 * self.n_dense * K, bias=False)
            self.o_proj = Linear(self.n_dense * K, D, bias=False)

    def whole(self, x: Float[Tensor, "B T D"], lengths: Int[Tensor, "B"] | None = None) -> Float[Tensor, "B T D"]:
        x = zero_padding(x, lengths)
        y = self._sparse(x, lengths)
        return y + self._dense(x, lengths) if self.n_dense else y

    def _dense(self, x: Float[Tensor, "B T D"], lengths: Int[Tensor, "B"] | None) -> Float[Tensor, "B T D"]:
        return self.o_proj(attention(*self._dense_lines(x), causal=self.config.causal, lengths=lengths).flatten(2))

    def _dense_lines(self, x: Float[Tensor, "B T D"]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.n_dense, -1)).unbind(2)
        positions = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        return self._turned(q, positions), self._turned(k, positions), v

    def _sparse(self, x: Float[Tensor, "B T D"], lengths: Int[Tensor, "B"] | None) -> Float[Tensor, "B T D"]:
        """A head's tokens in their order are a row of their own: a plain attention, causal by their order alone.

        A row that is shorter chooses fewer. What it has too many stands last, where no other sees it, and weighs nothing.
        """
        B, T, _ = x.shape
        r = router_logits(x, self.router.weight).mT
        place, counts = self._chosen(r, lengths)
        found, place = place < T, place.clamp(max=max(T - 1, 0))
        row = torch.arange(B, device=x.device)[:, None, None]
        lines = torch.einsum("bhsd,hod->bhso", x[row, place], self.qkv_heads).flatten(0, 1)[:, :, None]
        q, k, v = lines.chunk(3, -1)
        q, k = (self._turned(t, place.flatten(0, 1)) for t in (q, k))
        lengths = None if lengths is None else counts.repeat_interleave(self.n_heads)
        o = attention(q, k, v, causal=self.config.causal, lengths=lengths)[:, :, 0].unflatten(0, (B, self.n_heads))
        gate = r.gather(-1, place).sigmoid() * found
        y = torch.einsum("bhsk,hdk->bhsd", gate.to(x.dtype)[..., None] * o, self.o_heads)
        flat = torch.zeros_like(x).flatten(0, 1).index_add(0, (row * T + place).flatten(), y.flatten(0, 2))
        return flat.reshape(x.shape)

    def _chosen(
        self, r: Float[Tensor, "B H T"], lengths: Int[Tensor, "B"] | None
    ) -> tuple[Int[Tensor, "B H S"], Int[Tensor, "B"]]:
        """Where each head's tokens stand, in order, T for one too many; and how many a row's heads have."""
        B, _, T = r.shape
        lengths = torch.full((B,), T, device=r.device) if lengths is None else lengths
        counts = (lengths // self.config.sparsity).clamp(min=2).minimum(lengths)
        r = r.masked_fill(~valid_mask(lengths, T)[:, None], -torch.inf)
        if self.config.include_first:
            r = torch.cat([torch.full_like(r[..., :1], torch.inf), r[..., 1:]], -1)
        ranked = best(r, int(counts.max()) if B else 0)
        too_many = torch.arange(ranked.shape[-1], device=r.device) >= counts[:, None, None]
        return ranked.masked_fill(too_many, T).sort(-1).values, counts

    def _turned(self, t: Float[Tensor, "B T H K"], positions: Int[Tensor, "B T"]) -> Float[Tensor, "B T H K"]:
        return partial_rope(t, positions, self.config.rope_base, self.config.rope_fraction)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Row by row and head by head; each chosen token reads those chosen before it."""
        (B, T, _), c, y = x.shape, self.config, torch.zeros_like(x)
        for b, h in ((b, h) for b in range(B) for h in range(self.n_heads)):
            r = x[b] @ self.router.weight[h]
            wanted = [torch.inf if c.include_first and t == 0 else r_t for t, r_t in enumerate(r.tolist())]
            ranked = sorted(range(T), key=lambda t, wanted=wanted: -wanted[t])
            chosen = sorted(ranked[: min(max(T // c.sparsity, 2), T)])
            q, k, v = (x[b, chosen] @ W.T for W in self.qkv_heads[h].chunk(3))
            q, k = (self._turned(t[None, :, None], torch.tensor([chosen]))[0, :, 0] for t in (q, k))
            for i, t in enumerate(chosen):
                seen = slice(i + 1) if c.causal else slice(None)
                o = (k[seen] @ q[i] / self.head_dim**0.5).softmax(0) @ v[seen]
                y[b, t] = y[b, t] + r[t].sigmoid() * self.o_heads[h] @ o
        if self.n_dense:
            y = y + self.o_proj(softmax_reference(*self._dense_lines(x), causal=c.causal).flatten(2))
        return y

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        chosen = min(max(T // self.config.sparsity, 2), T)
        lines = 8.0 * B * self.n_heads * chosen * self.config.d_model * self.head_dim
        sparse = lines + attention_flops(chosen, B, self.n_heads, self.head_dim, mode)
        return sparse + attention_flops(T, B, self.n_dense, self.head_dim, mode)
