r"""Liger attention: a softmax model's own queries, keys and values read twice, by its window and by a gated linear state.

    S_t = diag(a_t) S_{t-1} + softmax(k_t) v_t^T              a_t = sigmoid(k_t)^(1/16), channel by channel
    y_t = W_o (sum_{t-W < s <= t} softmax_s(q_t . k_s / sqrt(K)) v_s + S_t^T softmax(q_t)) / 2

No weight is added to those of the softmax model: the gate is made of its keys, then low-rank changes of the projections are
trained. The paper pools the keys for the gate; in the authors' code, which made the published models, the pooling leaves every
channel as it is. Rotary positions turn q and k for the window alone. W counts the current token; the authors' 64 are those before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, PositiveFloat
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.grouped_qkv import GroupedConfig, GroupedQKV
from slipstream.layers.linear import Linear
from slipstream.layers.rope import partial_rope
from slipstream.layers.sparse_lines import read_window, recent_slots
from slipstream.ops.attention import attention_flops
from slipstream.ops.attention import reference as softmax_reference
from slipstream.ops.outer_scan import outer_flops, outer_scan, outer_step
from slipstream.ops.outer_scan import reference as outer_reference

Far = Callable[..., tuple[Tensor, Tensor]]  # of phi(q), phi(k), v and log_decay: outputs and S


class LigerAttention(Mixer, name="liger_attention", family="hybrid"):
    paper = "Lan, Sun, Hu, Zhou, Cheng 2025, Liger, arXiv:2503.01496; as in the authors' LigerGatedLinearAttention"
    use_when = "a softmax model is to be given constant memory without a single new weight"
    writes, erases = "k and v, beside the last W; softmax(k) v^T", "nothing"
    decays, reads = "of S a number a key channel, from k", "(softmax(K q)^T V + S^T softmax(q)) / 2"
    symbols = {"W": "window", "a": "exp(log_decay)", "16": "gate_normaliser"}
    oracle = "both parts in T x T matrices in numpy, tests/oracles/hybrids.npz"

    class Config(GroupedConfig):
        window: int = Field(64, ge=1)  # tokens that the softmax sees, the current one included
        gate_normaliser: PositiveFloat = 16.0  # the gate's logarithm is divided by this, which keeps it near 1
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_heads=4, n_kv_heads=2, window=5, gate_normaliser=2.0, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.rope_scaling:
            raise InputError(
                "liger_attention sees 64 tokens with positions: rope_scaling has nothing to stretch, leave it none"
            )
        self.qkv = GroupedQKV(config.model_copy(update={"rope_base": None}))
        self.o_proj = Linear(self.qkv.width, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        H, K = self.qkv.n_heads, self.qkv.head_dim
        return {"S": Slot((H, K, K)), **recent_slots(self.qkv, self.config.window - 1)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        def far(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
            return outer_scan(q, k, v, log_decay, state["S"], lengths, chunk_size=self.config.chunk_size)

        return self._both(x, state, lengths, far)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        return self._both(x, state, None, lambda *line: outer_step(*line, state["S"]))

    def _both(self, x: Tensor, state: State, lengths: Tensor | None, far: Far):
        q, k, v, convs = self.qkv(x, state, lengths)
        o, S = far(*self._lines(q, k, v))
        q, k = self._turned(q, k, state.length)
        near, kept = read_window(q, k, v, state, lengths, self.config.window)
        new = state.advance(x.shape[1] if lengths is None else lengths, S=S, **kept, **convs)
        return self._average(near, o), new

    def _lines(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the linear rule takes, by query heads, in float32 at least."""
        wide, repeat = torch.promote_types(q.dtype, torch.float32), self.qkv.n_heads // self.qkv.n_kv_heads
        q, k, v = q.to(wide), *(t.to(wide).repeat_interleave(repeat, 2) for t in (k, v))
        return q.softmax(-1), k.softmax(-1), v, F.logsigmoid(k) / self.config.gate_normaliser

    def _turned(self, q: Tensor, k: Tensor, past: Int[Tensor, "B"]) -> tuple[Tensor, Tensor]:
        c, positions = self.config, past[:, None] + torch.arange(q.shape[1], device=q.device)
        if not c.rope_base:
            return q, k
        return tuple(partial_rope(t, positions, c.rope_base, c.rope_fraction) for t in (q, k))  # type: ignore[return-value]

    def _average(self, near: Float[Tensor, "B T H K"], far: Float[Tensor, "B T H K"]) -> Float[Tensor, "B T D"]:
        return self.o_proj((near + far.to(near.dtype)).flatten(2) / 2)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self.qkv.reference(x)
        far, _ = outer_reference(*self._lines(q, k, v))
        q, k = self._turned(q, k, torch.zeros(len(x), dtype=torch.long))
        return self._average(softmax_reference(q, k, v, window=self.config.window), far)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        H, K, c = self.qkv.n_heads, self.qkv.head_dim, self.config
        near = attention_flops(T, B, H, K, mode, c.window)
        return near + outer_flops(T, B, H, K, K, mode, "channel", c.chunk_size)
