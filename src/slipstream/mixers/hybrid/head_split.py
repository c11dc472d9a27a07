r"""Head split: some heads of a layer are softmax over a window, the others a linear state with a decay, on the same q, k, v.

    o_t^h = sum_{t-W < s <= t} softmax_s(q_t . k_s / sqrt(K)) v_s               for the first heads
    S_t = a_t S_{t-1} + k_t v_t^T        o_t^h = S_t^T q_t / sqrt(K)            for the last n_linear heads
    y_t = W_o [rms_norm(o_t^1), ..., rms_norm(o_t^H)]                           a_t = exp(-exp(A_log) softplus(W_a x_t + dt_bias))

The head-wise split of surveys, in its plainest form: no paper has exactly this. The decay is Mamba-2's, a number a head and
token. What is exact and what is summed up is a matter of the head, where Hymba and Falcon-H1 have two mixers side by side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveFloat
from torch import Tensor

from slipstream.core.config import heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.decay_gate import NO_WEIGHT_DECAY, decay_rates, log_decay, time_steps
from slipstream.layers.grouped_qkv import GroupedConfig, GroupedQKV
from slipstream.layers.linear import Linear
from slipstream.layers.norm import RMSNorm
from slipstream.layers.sparse_lines import read_window
from slipstream.ops.attention import attention_flops
from slipstream.ops.attention import reference as softmax_reference
from slipstream.ops.outer_scan import outer_flops, outer_scan, outer_step
from slipstream.ops.outer_scan import reference as outer_reference


class HeadSplit(Mixer, name="head_split", family="hybrid"):
    paper = (
        "head-wise split as in the survey of Sun et al. 2025, Speed Always Wins, arXiv:2508.09834; decay: Dao & Gu 2024, "
        "arXiv:2405.21060"
    )
    use_when = "one layer should see what is near exactly and the rest in sum, for the parameters of plain attention"
    writes, erases = "k and v, beside the last W; k v^T", "nothing"
    decays, reads = "of S a number a head, from x", "softmax(K q)^T V, or S^T q, by heads"
    symbols = {"W": "window", "a": "exp(log_decay)"}
    oracle = "both kinds of heads in T x T matrices in numpy, tests/oracles/hybrids.npz"
    no_weight_decay = NO_WEIGHT_DECAY

    class Config(GroupedConfig):
        window: int = Field(256, ge=1)  # tokens that softmax heads see, the current one included
        n_linear: int | None = None  # heads that are linear, the last ones; default half of them
        norm_eps: PositiveFloat = 1e-6  # added under the roots of the heads' norm
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=24, n_heads=6, n_kv_heads=3, n_linear=2, window=5, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        n_heads = config.n_heads or 2 * heads(config.d_model // 2, None)  # one of each kind at least
        self.qkv = GroupedQKV(config.model_copy(update={"n_heads": n_heads}))
        group = n_heads // self.qkv.n_kv_heads
        self.n_linear = n_heads // 2 // group * group if config.n_linear is None else config.n_linear
        if not 0 < self.n_linear < n_heads or self.n_linear % group:
            raise InputError(
                f"n_linear {self.n_linear} must be less than n_heads {n_heads}, and whole groups of {group} heads that share keys"
            )
        self.n_softmax, self.kv_softmax = n_heads - self.n_linear, (n_heads - self.n_linear) // group
        self.a_proj = Linear(config.d_model, self.n_linear, bias=False)
        self.A_log, self.dt_bias = decay_rates(self.n_linear), time_steps(self.n_linear)
        self.o_norm = RMSNorm(self.qkv.head_dim, config.norm_eps)
        self.o_proj = Linear(self.qkv.width, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        K = self.qkv.head_dim
        line = Slot((self.config.window - 1, self.kv_softmax, K), dtype=None)
        return {"S": Slot((self.n_linear, K, K)), "k": line, "v": line, **self.qkv.slots()}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        def far(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
            return outer_scan(q, k, v, decay, state["S"], lengths, q.shape[3] ** -0.5, self.config.chunk_size)

        return self._both(x, state, lengths, far)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        scale = self.qkv.head_dim**-0.5
        return self._both(x, state, None, lambda *line: outer_step(*line, state["S"], scale))

    def _both(self, x: Tensor, state: State, lengths: Tensor | None, far: Callable[..., tuple[Tensor, Tensor]]):
        q, k, v, convs = self.qkv(x, state, lengths)
        (q, k, v), linear = self._split(q, k, v)
        o, S = far(*linear, self._log_decay(x))
        near, kept = read_window(q, k, v, state, lengths, self.config.window)
        new = state.advance(x.shape[1] if lengths is None else lengths, S=S, **kept, **convs)
        return self._output(near, o), new

    def _split(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """q, k and v of softmax heads; and of linear ones, keys and values repeated for heads that share them."""
        group, (at, kv) = self.qkv.n_heads // self.qkv.n_kv_heads, (self.n_softmax, self.kv_softmax)
        linear = q[:, :, at:], *(t[:, :, kv:].repeat_interleave(group, 2) for t in (k, v))
        return (q[:, :, :at], k[:, :, :kv], v[:, :, :kv]), linear

    def _log_decay(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H"]:
        return log_decay(self.a_proj(x), self.A_log, self.dt_bias)

    def _output(self, near: Float[Tensor, "B T H K"], far: Float[Tensor, "B T G K"]) -> Float[Tensor, "B T D"]:
        return self.o_proj(self.o_norm(torch.cat([near, far.to(near.dtype)], 2)).flatten(2))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        (q, k, v), (linear_q, linear_k, linear_v) = self._split(*self.qkv.reference(x))
        near = softmax_reference(q, k, v, window=self.config.window)
        far, _ = outer_reference(linear_q, linear_k, linear_v, self._log_decay(x), scale=self.qkv.head_dim**-0.5)
        return self._output(near, far)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        K, c = self.qkv.head_dim, self.config
        near = attention_flops(T, B, self.n_softmax, K, mode, c.window)
        return near + outer_flops(T, B, self.n_linear, K, K, mode, "head", c.chunk_size)
