r"""SwitchHead: few attention maps, each with many values and outputs, of which every token picks a few.

    y_t = sum_h sum_i sigmoid(r^o_t)_e W_o^he o_t^h        e = e^o_thi: the top_k largest of r^o_t = W_ro^h x_t
    v_s^h = sum_i sigmoid(r^v_s)_e W_v^he x_s        e = e^v_shi: the top_k largest of r^v_s = W_rv^h x_s
    o_t^h = sum_{s<=t} softmax_s(q_t^h . k_s^h / sqrt(K)) v_s^h        q, k = W_q x, W_k x

A head has n_experts value and as many output projections, and one map: gates do not compete, and no loss balances them.
Only chosen experts are computed. The first rope_fraction of q's and k's channels are turned by position (the authors' other
form, with the positions of Transformer-XL, is not here; nor is their dropout of experts, nor their special case of one
expert, which leaves the gate of values out). A step fetches the weights of chosen experts row by row, which is for few
rows; whole sequences take one product an expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.rope import partial_rope
from slipstream.ops.attention import attention, attention_flops, write_cache
from slipstream.ops.route import Gathered, Way, best, group, route_flops, router_logits, weigh


class SwitchHead(Mixer, name="switchhead", family="attention"):
    paper = "Csordas, Piekos, Irie, Schmidhuber 2023, arXiv:2312.07987, sec. 2; SwitchHeadRope of the authors' code"
    use_when = "attention of a few maps and a small key-value cache should know as much as one of many heads"
    train_order, decode_order = "T^2", "T"
    writes, erases = "k and v = sum_e sigmoid(r) W_v^e x, beside all others", "nothing"
    decays, reads = "nothing", "sum_e sigmoid(r) W_o^e softmax(K q)^T V"
    symbols = {"E": "n_experts", "k": "top_k", "W_S": "v_router", "W_D": "o_router"}
    oracle = "the authors' SwitchHeadRope in numpy, tests/oracles/attention_mixtures.npz"

    class Config(MixerConfig):
        n_heads: int | None = None  # attention maps; default d_model / 256, at least 2
        n_experts: int = 4  # value projections of a head, and as many output projections
        top_k: int = 2  # of each that a token uses in each head
        head_dim: int | None = None  # width of a head; default 2 d_model / n_heads / (1 + n_experts), nearly
        rope_fraction: float = Field(0.5, ge=0, le=1)  # share of q's and k's channels that are turned by position
        rope_base: float = 10000.0  # base of the rotary positions

    config: Config
    tiny = Config(d_model=16, n_heads=2, n_experts=3, head_dim=6, rope_fraction=0.7)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D, E = config.d_model, config.n_experts
        if not 1 <= config.top_k <= E:
            raise InputError(f"top_k {config.top_k} must be from 1 to n_experts {E}")
        self.n_heads = config.n_heads or max(2, D // 256)
        self.head_dim = config.head_dim or max(4, 4 * round(D / self.n_heads / (1 + E) / 2))
        H, K = self.n_heads, self.head_dim
        if (turned := int(config.rope_fraction * K)) % 2:
            raise InputError(
                f"rotary positions turn pairs: rope_fraction {config.rope_fraction:g} of head_dim {K} is {turned}, and must be even"
            )
        self.q_proj, self.k_proj = (Linear(D, H * K, bias=False) for _ in range(2))
        self.v_router, self.o_router = (Linear(D, H * E, bias=False) for _ in range(2))
        self.v_experts = nn.Parameter(torch.randn(H * E, K, D) * D**-0.5)
        self.o_experts = nn.Parameter(torch.randn(H * E, D, K) * (H * K) ** -0.5)
        for proj in (self.q_proj, self.k_proj):
            nn.init.normal_(proj.weight, std=D**-0.5)
        for router in (self.v_router, self.o_router):
            router.weight.data = F.normalize(torch.randn_like(router.weight), dim=-1)

    def slots(self) -> dict[str, Slot]:
        cache = Slot((0, self.n_heads, self.head_dim), dtype=None, grows=True)
        return {"k": cache, "v": cache}

    def _from_fresh(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Training needs no cache."""
        q, k = self._turned(x, torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1))
        return self._output(attention(q, k, self._values(x, self._grouped)), x, self._grouped)

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        return self._continued(x, self._grouped, self.reserve(state, x.shape[1]), lengths)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        """In a cache that has room already: init_state(B, max_len), or reserve."""
        return self._continued(x, Gathered, state, None)

    def _continued(
        self, x: Tensor, way: Callable[[Tensor], Way], state: State, lengths: Tensor | None
    ) -> tuple[Tensor, State]:
        q, *new = self._turned(x, state.length[:, None] + torch.arange(x.shape[1], device=x.device))
        new.append(self._values(x, way))
        k, v = (write_cache(state[n], t, state.length, lengths) for n, t in zip("kv", new))
        y = self._output(attention(q, k, v, state.length), x, way)
        return y, state.advance(x.shape[1] if lengths is None else lengths, k=k, v=v)

    def _grouped(self, experts: Int[Tensor, "B T E"]) -> Way:
        return group(experts, self.n_heads * self.config.n_experts)

    def _turned(self, x: Tensor, positions: Int[Tensor, "B T"]) -> list[Float[Tensor, "B T H K"]]:
        """q and k."""
        lines = (proj(x).unflatten(-1, (self.n_heads, -1)) for proj in (self.q_proj, self.k_proj))
        return [partial_rope(t, positions, self.config.rope_base, self.config.rope_fraction) for t in lines]

    def _route(self, x: Tensor, router: Linear) -> tuple[Int[Tensor, "B T E"], Float[Tensor, "B T H k"]]:
        """The chosen experts of all heads, in one row, numbered through; and their weights."""
        logits = router_logits(x, router.weight).unflatten(-1, (self.n_heads, -1))
        chosen = best(logits, self.config.top_k)
        first = self.config.n_experts * torch.arange(self.n_heads, device=x.device)[:, None]
        return (first + chosen).flatten(2), weigh(logits, chosen, "sigmoid", normalised=False).to(x.dtype)

    def _values(self, x: Float[Tensor, "B T D"], way: Callable[[Tensor], Way]) -> Float[Tensor, "B T H K"]:
        experts, w = self._route(x, self.v_router)
        chosen = way(experts)
        own = chosen.back(chosen.project(chosen.send(x), self.v_experts))
        return (w[..., None] * own.unflatten(2, w.shape[2:])).sum(3)

    def _output(self, o: Float[Tensor, "B T H K"], x: Float[Tensor, "B T D"], way: Callable[[Tensor], Way]) -> Tensor:
        experts, w = self._route(x, self.o_router)
        chosen = way(experts)
        own = (w[..., None] * o[:, :, :, None]).flatten(2, 3)
        return chosen.combine(chosen.each(own), self.o_experts)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Token by token and head by head: values of all, then outputs."""
        E, K, y = self.config.n_experts, self.head_dim, torch.zeros_like(x)
        q, k = self._turned(x, torch.arange(x.shape[1]).expand(len(x), -1))
        for b in range(len(x)):
            for h in range(self.n_heads):
                own, values = slice(h * E, (h + 1) * E), []
                for x_s in x[b]:
                    chosen = (self.v_router.weight[own] @ x_s).topk(self.config.top_k)
                    pairs = zip(chosen.values.sigmoid(), chosen.indices.tolist())
                    values.append(sum(w * self.v_experts[own][e] @ x_s for w, e in pairs))
                for t, x_t in enumerate(x[b]):
                    weights = (k[b, : t + 1, h] @ q[b, t, h] / K**0.5).softmax(0)
                    o = weights @ torch.stack(values[: t + 1])
                    chosen = (self.o_router.weight[own] @ x_t).topk(self.config.top_k)
                    for w, e in zip(chosen.values.sigmoid(), chosen.indices.tolist()):
                        y[b, t] = y[b, t] + w * self.o_experts[own][e] @ o
        return y

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        choices = B * (1 if mode == "step" else T) * self.n_heads * self.config.top_k
        experts = 2 * route_flops(choices, self.config.d_model, self.head_dim)
        return experts + attention_flops(T, B, self.n_heads, self.head_dim, mode)
