r"""LoLCATs attention: softmax over the last tokens and linear attention over all before them, under one denominator.

    o_t = (g sum_{t-W < s <= t} e^{l_ts - m_t} v_s + phi(q_t)^T S) / (g sum_{t-W < s <= t} e^{l_ts - m_t} + phi(q_t)^T z)
    S = sum_{s <= t-W} phi(k_s) v_s^T      z = sum_{s <= t-W} phi(k_s)      l_ts = q_t . k_s / sqrt(K)      m_t = max_s l_ts
    phi(x) = [softmax(W_h x), softmax(-W_h x)], g = sigmoid(window_factor), a number a head

What leaves the window enters S, so that every token is read exactly once. The weights of a softmax model fit as they are (rotary
positions are in q and k of both parts); phi and g are then trained to give back what that model gave, and low-rank changes of the
projections after that. Here all of it learns at once, and W_h starts as the identity, as far as it is square. The authors' faster
windows go in steps of W ("terraces"); these are their sliding ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.feature_maps import learned_pair
from slipstream.layers.grouped_qkv import GroupedConfig, GroupedQKV
from slipstream.layers.linear import Linear
from slipstream.layers.sparse_lines import read_recent, recent_slots
from slipstream.ops.index_sets import Window
from slipstream.ops.index_tiles import groups, pairs
from slipstream.ops.outer_scan import outer_flops, outer_scan, outer_step
from slipstream.ops.softmax import PLAIN, logits_of, read_by_logits
from slipstream.ops.sparse_attention import over_tiles

WINDOW_SHARE = -2.1972245773362196  # window_factor at the start, as in the authors' settings: g = 0.1


class LoLCATsAttention(Mixer, name="lolcats_attention", family="hybrid"):
    paper = "Zhang et al. 2024, LoLCATs, arXiv:2410.10254, sec. 3.3; scale of the window's part as in the authors' code"
    use_when = (
        "a softmax model is to be given constant memory with little training, or exact near tokens with a far summary"
    )
    writes, erases = "k and v, beside the last W; phi(k) v^T of what leaves them", "nothing"
    decays, reads = "nothing", "(g softmax part + S^T phi(q)) / (g its sum + z . phi(q))"
    symbols = {"W": "window", "phi": "learned_pair", "W_h": "feature_map_q, feature_map_k", "z": "the last column of S"}
    oracle = "the paper's weights in a T x T matrix in numpy, tests/oracles/hybrids.npz"
    no_weight_decay = ("window_factor",)

    class Config(GroupedConfig):
        window: int = Field(64, ge=1)  # tokens that the softmax sees, the current one included
        feature_dim: PositiveInt | None = None  # half the number of features; default the width of a head
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_heads=4, n_kv_heads=2, window=5, feature_dim=3, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.qkv = GroupedQKV(config)
        H, K = self.qkv.n_heads, self.qkv.head_dim
        self.n_features = 2 * (config.feature_dim or K)
        identity = torch.eye(self.n_features // 2, K).repeat(H, 1, 1)
        self.feature_map_q, self.feature_map_k = nn.Parameter(identity), nn.Parameter(identity.clone())
        self.window_factor = nn.Parameter(torch.full((H,), WINDOW_SHARE))
        self.o_proj = Linear(self.qkv.width, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        S = Slot((self.qkv.n_heads, self.n_features, self.qkv.head_dim + 1))
        return {"S": S, **recent_slots(self.qkv, self.config.window)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        def far(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return outer_scan(q, k, v, None, state["S"], lengths, chunk_size=self.config.chunk_size)

        return self._read(x, state, lengths, far)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        return self._read(x, state, None, lambda q, k, v: outer_step(q, k, v, None, state["S"]))

    def _read(self, x: Tensor, state: State, lengths: Tensor | None, far: Callable[..., tuple[Tensor, Tensor]]):
        W, past, kept = self.config.window, state.length, {}

        def read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """k and v begin W tokens before q: as many leave the window as come."""
            near, log_sum = over_tiles(_near, q, k, v, groups(Window(W), q.shape[1])[0], past, past - W)
            left = torch.arange(q.shape[1], device=q.device) >= W - past[:, None]
            sums, kept["S"] = far(*self._features(q, k[:, : q.shape[1]], v[:, : q.shape[1]], left))
            return self._merged(near, log_sum.exp(), sums)

        o, new = read_recent(self.qkv, x, state, lengths, read)
        return self.o_proj(o.flatten(2)), new.advance(0, **kept)

    def _features(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """phi(q), phi(k) and v with a one behind it, by query heads, in float32 at least; nothing for keys that are none."""
        wide, repeat = torch.promote_types(q.dtype, torch.float32), self.qkv.n_heads // self.qkv.n_kv_heads
        k, v = (t.to(wide).repeat_interleave(repeat, 2) for t in (k, v))
        phi_k = learned_pair(k, self.feature_map_k) * real[..., None, None]
        return learned_pair(q.to(wide), self.feature_map_q), phi_k, F.pad(v, (0, 1), value=1.0)

    def _merged(self, near: Tensor, total: Float[Tensor, "B T H"], sums: Float[Tensor, "B T H V1"]) -> Tensor:
        """total: the sum of the window's weights, of which the largest is 1."""
        total = (total * self.window_factor.sigmoid())[..., None]
        far, far_total = sums[..., :-1], sums[..., -1:]
        return ((total * near + far) / (total + far_total)).to(near.dtype)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        W, (q, k, v) = self.config.window, self.qkv.reference(x)
        phi_q, phi_k, _ = self._features(q, k, v, torch.ones(x.shape[:2], dtype=torch.bool))
        k, v = (t.repeat_interleave(self.qkv.n_heads // self.qkv.n_kv_heads, 2) for t in (k, v))
        outs, g = [], self.window_factor.sigmoid()[:, None]
        for t in range(x.shape[1]):
            first = max(0, t - W + 1)
            logits = torch.einsum("bhk,bshk->bhs", q[:, t], k[:, first : t + 1]) / k.shape[3] ** 0.5
            near = g * (logits - logits.amax(-1, keepdim=True)).exp()
            weights = torch.cat([torch.einsum("bhr,bshr->bhs", phi_q[:, t], phi_k[:, :first]), near], -1)
            o = torch.einsum("bhs,bshv->bhv", weights, v[:, : t + 1])
            outs.append(o / weights.sum(-1, keepdim=True))
        return self.o_proj(torch.stack(outs, 1).flatten(2))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        H, K, tokens = self.qkv.n_heads, self.qkv.head_dim, 1 if mode == "step" else T
        met = pairs(Window(self.config.window), tokens, T if mode == "step" else 0)
        features = 4.0 * B * tokens * H * K * self.n_features / 2
        scan = outer_flops(T, B, H, self.n_features, K + 1, mode, chunk_size=self.config.chunk_size)
        return 4.0 * B * H * K * met + features + scan


def _near(q: Tensor, k: Tensor, v: Tensor, meets: Tensor) -> tuple[Tensor, Tensor]:
    """A tile of the window's softmax, and the logarithm of the sum of its weights where the largest is 1."""
    logits = logits_of(q, k, PLAIN)
    o, log_sum = read_by_logits(logits, v, meets)
    largest = logits.masked_fill(~meets, -torch.inf).amax(-1).transpose(1, 2)
    return o, log_sum - torch.where(largest.isfinite(), largest, 0)
