r"""Mixture of heads (MoH): some heads every token uses, of the others it picks a few, and all are summed by weights.

    y_t = sum_h g_th W_o^h o_t^h        o_t^h = softmax(q_t^h . k_s^h / sqrt(K)) v_s^h over s <= t
    n shared heads: g_t = 2 a_1 n softmax(W_s x_t)        m chosen of the others: g_t = 2 a_2 m p_t / (sum of chosen p)
    a = softmax(W_a x_t)        p_t = softmax(W_r x_t)        heads not chosen: g_t = 0

n is n_shared_heads, m is top_k: the largest p are chosen. The factors 2, n and m are those of the authors' code of
MoH-ViT and MoH-DiT: with them heads weigh one in the mean, and routers at zero that choose all heads make plain
attention. Their LLaMA routes by the norm of q, without weights, which is not here; nor is the loss that balances heads.
All heads are computed, and those not chosen then weigh nothing, as in the authors' code: keys and values are needed anyway,
for tokens to come, and torch can skip a token's heads only by copying the caches of the others, which moves more than
reading all, unless few are chosen. So it costs what attention does, in time and in memory.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.grouped_qkv import GroupedConfig, GroupedQKV
from slipstream.layers.linear import Linear
from slipstream.ops.attention import attention, attention_flops, write_cache
from slipstream.ops.route import best, router_logits, weigh


class MixtureOfHeads(Mixer, name="mixture_of_heads", family="attention"):
    paper = "Jin, Zhu, Yuan, Yan 2024, arXiv:2410.11842, sec. 3; gates as in the authors' SkyworkAI/MoH"
    use_when = "attention whose tokens should differ in the heads they listen to, or heads are to be pruned later"
    train_order, decode_order = "T^2", "T"
    writes, erases = "k and v, beside all others", "nothing"
    decays, reads = "nothing", "sum_h g W_o^h softmax(K q)^T V"
    symbols = {
        "h_s": "n_shared_heads",
        "K": "top_k",
        "W_s": "gates.shared",
        "W_r": "gates.routed",
        "W_h": "gates.balance",
    }
    oracle = "the authors' MoHAttention in numpy with a causal mask, tests/oracles/attention_mixtures.npz"

    class Config(GroupedConfig):
        n_heads: int | None = None  # query heads; default d_model / 64, at least 4
        n_shared_heads: int | None = None  # heads that every token uses, the first; default n_heads / 4
        top_k: int | None = None  # heads that a token picks of the others; default n_heads / 2

    config: Config
    tiny = Config(d_model=16, n_heads=8, n_kv_heads=4, conv_size=3, n_shared_heads=2, top_k=3)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        n_heads = heads(config.d_model, config.n_heads, min(64, max(1, config.d_model // 4)))
        self.n_shared = n_heads // 4 if config.n_shared_heads is None else config.n_shared_heads
        self.top_k, n_routed = config.top_k or max(2, n_heads // 2), n_heads - self.n_shared
        if self.n_shared < 0 or not 2 <= self.top_k <= n_routed:
            raise InputError(
                f"top_k {self.top_k} must be from 2 (the weight of a single head is always the same, so that its router would "
                f"not learn) to the {n_routed} of {n_heads} heads that are not among the n_shared_heads {self.n_shared}"
            )
        self.qkv = GroupedQKV(config.model_copy(update={"n_heads": n_heads}))
        self.o_proj = Linear(config.d_model, config.d_model, bias=False)
        self.gates = HeadGates(config.d_model, n_heads, self.n_shared, self.top_k)

    def slots(self) -> dict[str, Slot]:
        cache = Slot((0, self.qkv.n_kv_heads, self.qkv.head_dim), dtype=None, grows=True)
        return {"k": cache, "v": cache, **self.qkv.slots()}

    def _from_fresh(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Training needs no cache."""
        q, k, v, _ = self.qkv(x, self.init_state(x.shape[0]), lengths)
        return self._output(attention(q, k, v), x)

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        return self.step(x, self.reserve(state, x.shape[1]), lengths)

    def step(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        """As prefill, in a cache that has room already: init_state(B, max_len), or reserve."""
        q, k, v, convs = self.qkv(x, state, lengths)
        k, v = write_cache(state["k"], k, state.length, lengths), write_cache(state["v"], v, state.length, lengths)
        y = self._output(attention(q, k, v, state.length), x)
        return y, state.advance(x.shape[1] if lengths is None else lengths, k=k, v=v, **convs)

    def _output(self, o: Float[Tensor, "B T H K"], x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.o_proj((self.gates(x).to(o.dtype)[..., None] * o).flatten(2))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Token by token and head by head, the heads it does not use left out."""
        q, k, v = (t.repeat_interleave(self.qkv.n_heads // t.shape[2], 2) for t in self.qkv.reference(x))
        by_head, y = self.o_proj.weight.chunk(self.qkv.n_heads, 1), torch.zeros_like(x)
        for b, t in ((b, t) for b in range(len(x)) for t in range(x.shape[1])):
            p = self.gates.routed(x[b, t]).softmax(0)
            chosen = p.topk(self.top_k)
            used = {h: self.top_k * w / chosen.values.sum() for h, w in zip(chosen.indices.tolist(), chosen.values)}
            g = {self.n_shared + h: w for h, w in used.items()}
            if self.n_shared:
                a = 2 * self.gates.balance(x[b, t]).softmax(0)
                shared = [1.0] if self.n_shared == 1 else self.n_shared * self.gates.shared(x[b, t]).softmax(0)
                g = {h: a[0] * w for h, w in enumerate(shared)} | {h: a[1] * w for h, w in g.items()}
            for h, w in g.items():
                weights = (k[b, : t + 1, h] @ q[b, t, h] / q.shape[-1] ** 0.5).softmax(0)
                y[b, t] = y[b, t] + w * by_head[h] @ (weights @ v[b, : t + 1, h])
        return y

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return attention_flops(T, B, self.qkv.n_heads, self.qkv.head_dim, mode)


class HeadGates(nn.Module):
    """x -> g: one in the mean over the heads that are used, zero for those not chosen. The shared heads are the first."""

    def __init__(self, d_model: int, n_heads: int, n_shared: int, top_k: int) -> None:
        super().__init__()
        self.n_shared, self.top_k = n_shared, top_k
        self.routed = self._router(d_model, n_heads - n_shared)
        if n_shared:
            self.balance = self._router(d_model, 2)
        if n_shared > 1:
            self.shared = self._router(d_model, n_shared)

    @staticmethod
    def _router(d_model: int, outputs: int) -> Linear:
        router = Linear(d_model, outputs, bias=False)
        nn.init.normal_(router.weight, std=0.02)
        return router

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H"]:
        logits = router_logits(x, self.routed.weight)
        chosen = best(logits, self.top_k)
        p = self.top_k * weigh(logits, chosen, "softmax", normalised=True)
        routed = torch.zeros_like(logits).scatter(-1, chosen, p)
        if not self.n_shared:
            return routed
        shared = torch.ones_like(logits[..., :1])
        if self.n_shared > 1:
            shared = self.n_shared * router_logits(x, self.shared.weight).softmax(-1)
        a = 2 * router_logits(x, self.balance.weight).softmax(-1)
        return torch.cat([a[..., :1] * shared, a[..., 1:] * routed], -1)
