r"""PaTH attention: positions that accumulate along the path, one reflection or erasure of the keys for every token.

    o_t = sum_{s<=t} softmax_s((q_t^T H_t ... H_{s+1} k_s + sum_{i=s+1..t} log f_i) / sqrt(K)) v_s

    H_i = I - beta_i w_i w_i^T        w = unit(silu(conv(W_w x)))        beta_i = 2 sigmoid(W_b x_i + b)
    f_i = sigmoid(W_f x_i + b) with forget_gate (PaTH-FoX), else 1

Where rotary positions turn a key by how far it is, this turns it by what came in between, so that states can be tracked.
The cache holds keys as the last token leaves them: a step updates them all. Weights and the scaled forget gate as in fla
(w_proj of rank 32, bt_proj, g_proj for W_f).
"""

from __future__ import annotations

from itertools import pairwise

from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.grouped_lines import add_grouped_lines, forget_bias, grouped_lines, log_forget
from slipstream.layers.linear import Linear
from slipstream.layers.norm import RMSNorm
from slipstream.layers.short_conv import ShortConv
from slipstream.ops.attention import attention, attention_flops, write_cache
from slipstream.ops.l2_norm import l2_norm
from slipstream.ops.path_attention import path_attention, path_flops, path_step
from slipstream.ops.path_attention import reference as path_reference


class PathAttention(Mixer, name="path_attention", family="attention"):
    paper = "Yang et al. 2025 (PaTH), arXiv:2505.16381"
    use_when = (
        "attention is affordable, and where something stands is said by the text between, not by a count of tokens"
    )
    writes, erases = "k and v, beside all others", "beta of every key's part along w"
    decays, reads = "nothing, or a number a head, from x, before the softmax", "softmax(K q)^T V"
    train_order, decode_order = "T^2", "T"
    symbols = {"H": "I - beta w w^T", "beta": "beta", "f": "exp(log_f)"}
    oracle = "naive_path_attn of fla 0.6.0 between the parts of its layer, tests/oracles/delta_family.npz"

    class Config(MixerConfig):
        n_heads: int | None = None  # query heads; default d_model / 64
        n_kv_heads: int | None = None  # key and value heads, each for a group of query heads; default n_heads
        w_rank: int | None = 32  # rank of the projection to w; None for a full one
        conv_size: int = 3  # width of the short convolution on w; 0 for none
        negative_eigenvalues: bool = True  # beta in (0, 2), so that a token may reflect; False: in (0, 1)
        forget_gate: bool = False  # logits fall with every token in between: PaTH-FoX
        qk_norm: bool = False  # RMS-normalise q and k per head
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_heads=4, n_kv_heads=2, w_rank=3, forget_gate=True, qk_norm=True, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads, self.n_kv_heads, self.head_dim = add_grouped_lines(self, config.n_heads, config.n_kv_heads)
        D, kv_width = config.d_model, self.n_kv_heads * self.head_dim
        ranks = [D, *([config.w_rank] if config.w_rank else []), kv_width]
        self.w_proj = nn.Sequential(*(Linear(a, b, bias=False) for a, b in pairwise(ranks)))
        self.w_conv1d = ShortConv(kv_width, config.conv_size) if config.conv_size else None
        self.bt_proj = Linear(D, self.n_kv_heads)
        self.g_proj = Linear(D, self.n_heads) if config.forget_gate else None
        self.q_norm, self.k_norm = (RMSNorm(self.head_dim) if config.qk_norm else nn.Identity() for _ in range(2))

    def slots(self) -> dict[str, Slot]:
        dims = (0, self.n_kv_heads, self.head_dim)
        keys = Slot(dims, grows=True)  # wide: they are updated by every token
        forget = {"log_f": Slot((0, self.n_heads), grows=True)} if self.g_proj else {}
        conv = {"conv_w": self.w_conv1d.slot()} if self.w_conv1d else {}
        return {"k": keys, "v": Slot(dims, dtype=None, grows=True), **forget, **conv}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        state = self.reserve(state, x.shape[1])
        (q, k, v, w, beta), slots = self._project(x, state, lengths)
        past, scale, bias = state.length, self.head_dim**-0.5, self._key_bias(slots)
        o, k, old_k = path_attention(
            q, k, v, w, beta, state["k"], state["v"], past, lengths, scale, bias, self.config.chunk_size
        )
        slots |= {"k": write_cache(old_k, k, past, lengths), "v": write_cache(state["v"], v, past, lengths)}
        return self._output(o), state.advance(x.shape[1] if lengths is None else lengths, **slots)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        """One token, in a cache that has room already: init_state(B, max_len), or reserve."""
        (q, k, v, w, beta), slots = self._project(x, state, None)
        keys = write_cache(path_step(w, beta, state["k"]), k, state.length)
        slots |= {"k": keys, "v": write_cache(state["v"], v, state.length)}
        o = attention(q, keys.to(q.dtype), slots["v"], state.length, key_bias=self._key_bias(slots))
        return self._output(o), state.advance(1, **slots)

    def _project(self, x: Tensor, state: State, lengths: Tensor | None) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """q, k, v, w by heads, beta; and the new states of the convolution and of the forget gates."""
        w, slots = self.w_proj(x), {}
        if self.w_conv1d:
            w, slots["conv_w"] = self.w_conv1d(w, state["conv_w"], lengths)
        if self.g_proj:
            slots["log_f"] = write_cache(state["log_f"], log_forget(self.g_proj(x)), state.length, lengths)
        return self._by_heads(x, w), slots

    def _by_heads(self, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        (q, k, v), turn = grouped_lines(self, x, self.head_dim), l2_norm(w.unflatten(-1, (-1, self.head_dim)))
        beta = self.bt_proj(x).sigmoid() * (2 if self.config.negative_eigenvalues else 1)
        return self.q_norm(q), self.k_norm(k), v, turn, beta

    def _key_bias(self, slots: dict[str, Tensor]) -> Float[Tensor, "B S H"] | None:
        return forget_bias(slots["log_f"]) * self.head_dim**-0.5 if self.g_proj else None

    def _output(self, o: Float[Tensor, "B T H V"]) -> Float[Tensor, "B T D"]:
        return self.get_submodule("o_proj")(o.flatten(2))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        w = self.w_proj(x)
        q, k, v, w, beta = self._by_heads(x, self.w_conv1d.reference(w) if self.w_conv1d else w)
        bias = -log_forget(self.g_proj(x)).cumsum(1) * self.head_dim**-0.5 if self.g_proj else None
        return self._output(path_reference(q, k, v, w, beta, bias, self.head_dim**-0.5))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        if mode == "step":
            return attention_flops(T, B, self.n_heads, self.head_dim, mode)
        sizes = self.n_heads, self.n_kv_heads, self.head_dim, self.head_dim
        return path_flops(T, B, *sizes, self.config.chunk_size)
