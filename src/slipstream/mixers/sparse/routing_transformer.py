r"""Routing Transformer: a token meets earlier tokens of its own cluster; clusters are those of k-means, learnt on the way.

    q_t = layer_norm(W_q x_t)        c(t) = argmax_c mu_c . q_t        G(t) = the last W of {s <= t : c(s) = c(t)}

    o_t = sum_{s in G(t), s != t} softmax_s(q_t . q_s / sqrt(K)) v_s        half of the heads: the last W tokens

Local heads have keys of their own. The norm has neither weight nor bias, mu is of unit length, and a token meets itself
only where it is the first of its cluster. What differs from the paper: there, each cluster takes its w nearest tokens of
the whole sequence, so that whom a token meets hangs on later tokens (and some tokens meet nobody, some several clusters).
Here it is in its nearest cluster and meets that cluster's last W tokens, whatever comes later, so that every mode is exact
and memory constant. The authors' code does not divide logits and lets a token meet itself, which outweighs all others where
queries are keys; here it is as in routing-transformer on PyPI. Positions are rotary, turned after clustering; theirs are
relative.

Centroids are no parameters but a buffer: mu <- lambda mu + (1 - lambda) (direction of the sum of its tokens), when a training
step's gradient passes (so once, however often the forward pass is made again), and never in evaluation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.buckets import chosen_heads, ring_slots, rings_of
from slipstream.layers.linear import Linear
from slipstream.layers.rope import rope
from slipstream.ops.attention import attention_flops, window_attention
from slipstream.ops.attention import reference as softmax_reference
from slipstream.ops.bucket_attention import bucket_attention, bucket_flops, bucket_prefill, bucket_step
from slipstream.ops.bucket_attention import reference as bucket_reference
from slipstream.ops.valid import last_tokens, valid_mask, zero_padding

Local = tuple[Tensor, Tensor, Tensor]  # q, k and v of the local heads


class RoutingTransformer(Mixer, name="routing_transformer", family="sparse"):
    paper = "Roy et al. 2021, arXiv:2003.05997 (TACL), algorithm 1"
    use_when = "a text has threads that go on far apart: what is near and what is of the same kind are both to be seen"
    writes, erases = "k and v, in the cluster of q", "nothing"
    decays, reads = "the oldest of a cluster's W, all at once", "softmax(K q)^T V over the cluster, and over the window"
    train_order, decode_order = "T", "1"
    symbols = {"mu": "centroids", "k": "n_clusters", "w": "window", "lambda": "centroid_decay"}
    oracle = "algorithm 1 with nearest clusters as T x T masks in numpy, tests/oracles/bucket_attention.npz"

    class Config(MixerConfig):
        n_heads: int | None = None  # heads, local ones included; default d_model / 64
        n_local_heads: int | None = None  # heads that see the last tokens instead; default half of n_heads
        n_clusters: int = Field(16, ge=1)  # clusters of each routing head
        window: int = Field(128, ge=1)  # tokens seen: of a cluster, or the last ones; the current one included
        rope_base: float | None = 10000.0  # base of the rotary positions; None for no positions (NoPE)
        centroid_decay: float = Field(0.99, ge=0, le=1)  # how slowly centroids follow their tokens in training
        seed: int = 0  # of the first centroids

    config: Config
    centroids: Tensor
    tiny = Config(d_model=16, n_heads=4, n_clusters=3, window=5, centroid_decay=0.99)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        n_heads, D = heads(config.d_model, config.n_heads), config.d_model
        self.n_local = n_heads // 2 if config.n_local_heads is None else config.n_local_heads
        if not 0 <= self.n_local < n_heads:
            raise InputError(f"n_local_heads {self.n_local} must leave at least one of n_heads {n_heads} to route")
        self.n_routing, self.head_dim = n_heads - self.n_local, D // n_heads
        self.q_proj, self.v_proj, self.o_proj = (Linear(D, D, bias=False) for _ in range(3))
        self.k_proj = Linear(D, self.n_local * self.head_dim, bias=False) if self.n_local else None
        draw = torch.Generator().manual_seed(config.seed)
        start = torch.randn(self.n_routing, config.n_clusters, self.head_dim, generator=draw)
        self.register_buffer("centroids", F.normalize(start, dim=-1))

    def slots(self) -> dict[str, Slot]:
        local = Slot((self.config.window - 1, self.n_local, self.head_dim), dtype=None)
        rings = ring_slots(self.n_routing, 1, self.config.n_clusters, self.config.window, self.head_dim)
        return rings | ({"local_k": local, "local_v": local} if self.n_local else {})

    def _from_fresh(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Training needs no rings."""
        past = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        (q, k, v, cluster), local = self._lines(x, past, lengths)
        o = bucket_attention(q, k, v, cluster, self.config.window, lengths, own=False)
        return self._output(o, local, self._fresh_window(x), past, lengths)[0]

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        (q, k, v, cluster), local = self._lines(x, state.length, lengths)
        o, rings = bucket_prefill(q, k, v, cluster, self.config.window, rings_of(state), lengths, own=False)
        y, windows = self._output(o, local, state.slots, state.length, lengths)
        return y, state.advance(x.shape[1] if lengths is None else lengths, **rings._asdict(), **windows)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        (q, k, v, cluster), local = self._lines(x, state.length, None)
        o, rings = bucket_step(q, k, v, cluster, self.config.window, rings_of(state), own=False)
        y, windows = self._output(o, local, state.slots, state.length, None)
        return y, state.advance(1, **rings._asdict(), **windows)

    def _fresh_window(self, x: Tensor) -> dict[str, Tensor]:
        none = x.new_zeros(x.shape[0], self.config.window - 1, self.n_local, self.head_dim)
        return {"local_k": none, "local_v": none}

    def _output(
        self, o: Tensor, local: Local | None, slots: dict[str, Tensor], past: Int[Tensor, "B"], lengths: Tensor | None
    ) -> tuple[Float[Tensor, "B T D"], dict[str, Tensor]]:
        """y, of what routing heads have read and of local ones, and the last tokens for these."""
        if local is None:
            return self.o_proj(o.flatten(2)), {}
        q, *new = local
        reach, names = self.config.window - 1, ("local_k", "local_v")
        k, v = (torch.cat([slots[n], zero_padding(t, lengths)], 1) for n, t in zip(names, new))
        o = torch.cat([o, window_attention(q, k, v, past, self.config.window)], 2)
        return self.o_proj(o.flatten(2)), {n: last_tokens(t, reach, lengths) for n, t in zip(names, (k, v))}

    def _lines(
        self, x: Tensor, past: Int[Tensor, "B"], lengths: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Local | None]:
        """Of routing heads q, k, v and clusters (B T H 1); of local ones q, k, v."""
        q = chosen_heads(self.q_proj, x, self.n_routing + self.n_local)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        shared = F.layer_norm(q[:, :, : self.n_routing], (self.head_dim,))
        cluster = self._clusters(shared, lengths)
        shared = self._placed(shared, past).to(x.dtype)
        routed = shared, shared, v[:, :, : self.n_routing], cluster
        if self.k_proj is None:
            return routed, None
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        q = q[:, :, self.n_routing :].to(x.dtype)
        return routed, (self._placed(q, past), self._placed(k, past), v[:, :, self.n_routing :])

    def _placed(self, qk: Float[Tensor, "B T H K"], past: Int[Tensor, "B"]) -> Float[Tensor, "B T H K"]:
        base = self.config.rope_base
        return rope(qk, past[:, None] + torch.arange(qk.shape[1], device=qk.device), base) if base else qk

    def _clusters(self, q: Float[Tensor, "B T H K"], lengths: Int[Tensor, "B"] | None) -> Int[Tensor, "B T H 1"]:
        """The nearest centroids (of equals the first), which follow their tokens when a gradient passes in training."""
        near = torch.einsum("bthk,hck->bthc", q.detach(), self.centroids.to(q.dtype))
        cluster = near.argmax(-1, keepdim=True)
        if self.training and q.requires_grad:
            q.register_hook(self._follow(q.detach(), cluster, lengths))
        return cluster

    def _follow(self, q: Tensor, cluster: Tensor, lengths: Tensor | None):
        """What moves the centroids; called with a gradient, which it leaves as it is."""
        member = F.one_hot(cluster[..., 0], self.config.n_clusters).to(q.dtype)
        if lengths is not None:
            q, member = zero_padding(q, lengths), member * valid_mask(lengths, q.shape[1])[..., None, None]
        total, taken = torch.einsum("bthc,bthk->hck", member, q), member.sum((0, 1)) > 0

        @torch.no_grad()
        def follow(_: Tensor) -> None:
            mu = self.centroids.to(q.dtype).lerp(F.normalize(total, dim=-1), 1 - self.config.centroid_decay)
            self.centroids.copy_(torch.where(taken[..., None], F.normalize(mu, dim=-1), self.centroids))

        return follow

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        (q, k, v, cluster), local = self._lines(x, torch.zeros(len(x), dtype=torch.long), None)
        o = bucket_reference(q, k, v, cluster, self.config.window, own=False)
        near = [] if local is None else [softmax_reference(*local, window=self.config.window)]
        return self.o_proj(torch.cat([o, *near], 2).flatten(2))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        c, K, tokens = self.config, self.head_dim, B * (1 if mode == "step" else T)
        near = 2.0 * tokens * self.n_routing * K * c.n_clusters
        local = attention_flops(T, B, self.n_local, K, mode, c.window) if self.n_local else 0.0
        return near + bucket_flops(T, B, self.n_routing, K, K, 1, c.window, mode) + local
