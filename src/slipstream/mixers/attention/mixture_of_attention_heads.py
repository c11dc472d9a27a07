r"""Mixture of attention heads (MoA): a router picks the queries of every token, over keys and values that all share.

    y_t = b + sum_i w_ti W_o^e Attn(W_q^e x_t; k_1..k_t, v_1..v_t)        e = e_ti: the top_k largest of r_t = W_r x_t
    w_t = softmax of r_t over the chosen        k, v = W_kv x, of n_kv_heads heads; an expert asks with as many

An expert is a pair of W_q and W_o. Only chosen ones are computed: attention costs what top_k * n_kv_heads heads cost,
the memory what n_kv_heads heads do, however many experts there are. Weights and rotary positions are those of JetMoe
(Shen et al. 2024, arXiv:2404.07413); the paper divides by the sum of the chosen without a gradient of that sum, and its
losses, which balance the experts, are left out. A step fetches the weights of chosen experts row by row, which is for few
rows; whole sequences take one product an expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.rope import rope
from slipstream.ops.attention import attention, attention_flops, write_cache
from slipstream.ops.route import Gathered, Way, best, group, route_flops, router_logits, weigh


class MixtureOfAttentionHeads(Mixer, name="mixture_of_attention_heads", family="attention"):
    paper = "Zhang, Shen, Huang, Zhou, Rong, Xiong 2022, arXiv:2210.05144, sec. 3; layer as JetMoe, arXiv:2404.07413"
    use_when = "many kinds of questions to one small key-value cache, each token paying for the few it asks"
    train_order, decode_order = "T^2", "T"
    writes, erases = "k and v, beside all others", "nothing"
    decays, reads = "nothing", "sum_i w_i W_o^e softmax(K q^e)^T V"
    symbols = {"E": "n_experts", "k": "top_k", "W_g": "router"}
    oracle = "transformers JetMoeAttention, tests/oracles/test_attention_mixture_oracles.py"
    no_weight_decay = ("bias",)

    class Config(MixerConfig):
        n_experts: int = 8  # pairs of query and output projections
        top_k: int = 4  # of them that a token uses
        n_kv_heads: int = 1  # heads of keys and values that all experts share, and of an expert's queries
        head_dim: int | None = None  # width of a head; default d_model / 4 / n_kv_heads
        rope_base: float | None = 10000.0  # base of the rotary positions; None for no positions (NoPE)

    config: Config
    tiny = Config(d_model=16, n_experts=5, top_k=3, n_kv_heads=2, head_dim=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D, E = config.d_model, config.n_experts
        if not 2 <= config.top_k <= E:
            raise InputError(
                f"top_k {config.top_k} must be from 2 (the weight of a single expert is always 1, so that its router would "
                f"not learn) to n_experts {E}"
            )
        self.head_dim = config.head_dim or D // (4 * config.n_kv_heads)
        if config.rope_base and self.head_dim % 2:
            raise InputError(f"rotary positions turn pairs: head_dim {self.head_dim} must be even, or rope_base none")
        width = config.n_kv_heads * self.head_dim
        self.router = Linear(D, E, bias=False)
        self.q_experts = nn.Parameter(torch.empty(E, width, D).uniform_(-(D**-0.5), D**-0.5))
        self.o_experts = nn.Parameter(torch.empty(E, D, width).uniform_(-(width**-0.5), width**-0.5))
        self.kv_proj = Linear(D, 2 * width, bias=False)
        self.bias = nn.Parameter(torch.zeros(D))

    def slots(self) -> dict[str, Slot]:
        cache = Slot((0, self.config.n_kv_heads, self.head_dim), dtype=None, grows=True)
        return {"k": cache, "v": cache}

    def _from_fresh(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Training needs no cache."""
        way, w = self._route(x, self._grouped)
        q, k, v = self._projected(x, way, torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1))
        return self._output(attention(q, k, v), w, way)

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        return self._continued(x, *self._route(x, self._grouped), self.reserve(state, x.shape[1]), lengths)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        """In a cache that has room already: init_state(B, max_len), or reserve."""
        return self._continued(x, *self._route(x, Gathered), state, None)

    def _continued(self, x: Tensor, way: Way, w: Tensor, state: State, lengths: Tensor | None) -> tuple[Tensor, State]:
        positions = state.length[:, None] + torch.arange(x.shape[1], device=x.device)
        q, *new = self._projected(x, way, positions)
        k, v = (write_cache(state[n], t, state.length, lengths) for n, t in zip("kv", new))
        y = self._output(attention(q, k, v, state.length), w, way)
        return y, state.advance(x.shape[1] if lengths is None else lengths, k=k, v=v)

    def _grouped(self, experts: Int[Tensor, "B T k"]) -> Way:
        return group(experts, self.config.n_experts)

    def _route(self, x: Tensor, way: Callable[[Tensor], Way]) -> tuple[Way, Float[Tensor, "B T k"]]:
        """The way to the chosen experts, and their weights."""
        logits = router_logits(x, self.router.weight)
        experts = best(logits, self.config.top_k)
        return way(experts), weigh(logits, experts, "softmax", normalised=True).to(x.dtype)

    def _projected(self, x: Tensor, way: Way, positions: Int[Tensor, "B T"]) -> tuple[Tensor, Tensor, Tensor]:
        """q (B T H K), those of one key head side by side; k and v (B T G K)."""
        q = way.back(way.project(way.send(x), self.q_experts)).unflatten(-1, (-1, self.head_dim))
        q = q.transpose(2, 3).flatten(2, 3)
        k, v = self.kv_proj(x).unflatten(-1, (2, -1, self.head_dim)).unbind(2)
        base = self.config.rope_base
        return (rope(q, positions, base), rope(k, positions, base), v) if base else (q, k, v)

    def _output(self, o: Float[Tensor, "B T H K"], w: Float[Tensor, "B T k"], way: Way) -> Float[Tensor, "B T D"]:
        own = o.unflatten(2, (self.config.n_kv_heads, -1)).transpose(2, 3).flatten(3)
        return way.combine(way.each(w[..., None] * own), self.o_experts) + self.bias

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Row by row and token by token, each chosen expert by itself."""
        positions, base = torch.arange(x.shape[1]).expand(len(x), -1), self.config.rope_base
        turned = (lambda t, at: rope(t, at, base)) if base else (lambda t, at: t)
        k, v = self.kv_proj(x).unflatten(-1, (2, -1, self.head_dim)).unbind(2)
        k, y = turned(k, positions), torch.zeros_like(x) + self.bias
        for b, t in ((b, t) for b in range(len(x)) for t in range(x.shape[1])):
            chosen = (self.router.weight @ x[b, t]).topk(self.config.top_k)
            for e, w in zip(chosen.indices.tolist(), chosen.values.softmax(0)):
                q = turned((self.q_experts[e] @ x[b, t]).reshape(1, 1, -1, self.head_dim), positions[:1, t : t + 1])
                logits = torch.einsum("gk,sgk->gs", q[0, 0], k[b, : t + 1]) / self.head_dim**0.5
                o = torch.einsum("gs,sgv->gv", logits.softmax(-1), v[b, : t + 1])
                y[b, t] = y[b, t] + w * self.o_experts[e] @ o.flatten()
        return y

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        c = self.config
        choices = B * (1 if mode == "step" else T) * c.top_k
        experts = 2 * route_flops(choices, c.d_model, c.n_kv_heads * self.head_dim)
        return experts + attention_flops(T, B, c.top_k * c.n_kv_heads, self.head_dim, mode)
