r"""Performer (FAVOR+): softmax attention approached from constant memory, by positive orthogonal random features.

    S_t = S_{t-1} + phi(k_t) v_t^T        z_t = z_{t-1} + phi(k_t)        o_t = S_t^T phi(q_t) / (z_t . phi(q_t))

    phi_r(x) = exp(w_r . x' - |x'|^2 / 2),  x' = x / K^(1/4),  w_r orthogonal Gaussian rows        y_t = W_o o_t

Features overflow, so logarithms are kept and a maximum is taken off: for a query its own, for keys the largest so far,
M_t. S and z are stored times exp(-M_t), which is a decay exp(M_{t-1} - M_t) <= 1 a token: causal, exact, and
cancelled by the division. Query features get EPS more, so that the divisor is at least EPS. The rows are drawn once
from the seed; the paper's redrawing in training is not done.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.config import MixerConfig, heads
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.feature_lines import wide_heads
from slipstream.layers.feature_maps import log_favor, orthogonal_gaussian_rows
from slipstream.layers.linear import Linear
from slipstream.layers.lines import add_lines, line_slots, lines_reference, run_lines
from slipstream.ops.normalised_scan import normalised_flops, normalised_scan, normalised_step
from slipstream.ops.normalised_scan import reference as normalised_reference
from slipstream.ops.valid import valid_mask, zero_padding

EPS = 1e-6  # the weight every past token keeps under any query, as in the authors' code
TINY = 1e-30  # nothing beside a divisor of at least EPS; without it padding is 0 / 0


class Performer(Mixer, name="performer", family="linear"):
    paper = "Choromanski et al. 2020, arXiv:2009.14794, lemma 1, eq. 5 and sec. 2.4"
    use_when = "a softmax model is to be approached in constant memory; more features come nearer and cost more"
    writes, erases = "phi(k) v^T", "nothing"
    decays, reads = "nothing", "S^T phi(q) / (z . phi(q))"
    train_order, decode_order = "T", "1"
    symbols = {"phi": "exp(log_favor)", "omega": "projection_matrix", "m": "n_features"}
    oracle = "eq. 4-5 with their T x T matrix in numpy, tests/oracles/linear_attention.npz"

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        n_features: int | None = None  # random features per head; default K ln K, where K = d_model / n_heads
        seed: int = 0  # of the random features
        conv_size: int = 0  # width of a short convolution on q, k and v; 0 for none, as in the paper
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    projection_matrix: Tensor
    tiny = Config(d_model=16, n_heads=2, n_features=11, conv_size=3, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads = heads(config.d_model, config.n_heads)
        self.head_dim = config.d_model // self.n_heads
        self.n_features = config.n_features or max(1, round(self.head_dim * math.log(self.head_dim)))
        add_lines(self, dict.fromkeys("qkv", config.d_model), config.conv_size)
        self.o_proj = Linear(config.d_model, config.d_model, bias=False)
        self.register_buffer("projection_matrix", orthogonal_gaussian_rows(self.n_features, self.head_dim, config.seed))

    def slots(self) -> dict[str, Slot]:
        S = Slot((self.n_heads, self.n_features, self.head_dim + 1))  # the last column is z
        return {"S": S, "max": Slot((self.n_heads,), start=-torch.inf), **line_slots(self)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        lines, convs = run_lines(self, "qkv", x, state, lengths)
        q, k, v, log_decay, largest = self._features(lines, state["max"], lengths)
        o, S = normalised_scan(q, k, v, log_decay, state["S"], lengths, TINY, self.config.chunk_size)
        return self._output(o, x), state.advance(x.shape[1] if lengths is None else lengths, S=S, max=largest, **convs)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        lines, convs = run_lines(self, "qkv", x, state, None)
        q, k, v, log_decay, largest = self._features(lines, state["max"], None)
        o, S = normalised_step(q, k, v, log_decay, state["S"], TINY)
        return self._output(o, x), state.advance(1, S=S, max=largest, **convs)

    def _features(self, lines: dict[str, Tensor], entering: Float[Tensor, "B H"], lengths: Int[Tensor, "B"] | None):
        """phi(q), phi(k) less the maxima, v, the log decay that the maximum makes, and the maximum."""
        log_q, log_k, v = self._log_features(lines)
        log_k = zero_padding(log_k, lengths)
        own = log_k.amax(-1)
        if lengths is not None:
            own = own.masked_fill(~valid_mask(lengths, own.shape[1])[..., None], -torch.inf)
        so_far = torch.cat([entering[:, None].to(own.dtype), own], 1).cummax(1).values
        before, now = so_far[:, :-1], so_far[:, 1:]
        log_decay = torch.where(before.isinf(), 0.0, before - now)
        phi_k = (log_k - torch.where(now.isinf(), 0.0, now)[..., None]).exp()
        return self._query(log_q), phi_k, v, log_decay, so_far[:, -1].to(entering.dtype)

    def _log_features(self, lines: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logarithms of phi(q) and phi(k), and v, in float32 at least."""
        q, k, v = wide_heads(lines, self.n_heads)
        rows, scale = self.projection_matrix.to(q.dtype), self.head_dim**-0.25
        return log_favor(q * scale, rows), log_favor(k * scale, rows), v

    def _query(self, log_q: Float[Tensor, "B T H R"]) -> Float[Tensor, "B T H R"]:
        return (log_q - log_q.amax(-1, keepdim=True)).exp() + EPS

    def _output(self, o: Float[Tensor, "B T H V"], x: Tensor) -> Float[Tensor, "B T D"]:
        return self.o_proj(o.flatten(2).to(x.dtype))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """With key features as printed, no maximum taken off: fine in float64 where features are moderate."""
        log_q, log_k, v = self._log_features(lines_reference(self, "qkv", x))
        return self._output(normalised_reference(self._query(log_q), log_k.exp(), v, eps=TINY)[0], x)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        features = 4.0 * B * (1 if mode == "step" else T) * self.n_heads * self.head_dim * self.n_features
        K, V, chunk_size = self.n_features, self.head_dim, self.config.chunk_size
        return features + normalised_flops(T, B, self.n_heads, K, V, mode, decays=True, chunk_size=chunk_size)
