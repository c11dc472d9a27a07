r"""HGRN2: a gated recurrent network whose state is expanded by an outer product, which makes it linear attention.

    S_t = D(f_t) S_{t-1} + (1 - f_t) i_t^T        o_t = S_t^T q_t / sqrt(K)

    f_t = b + (1 - b) sigmoid(W_f x_t)            q_t = silu(W_q x_t)        i_t = W_i x_t        y_t = W_o rmsnorm(o_t)

The forget gate is the key as well, and the output gate the query. It never falls below b, learned per channel. In the
paper the bounds of all layers are one softmax summed up over the layers, which starts at l / L in layer l of L, since
upper layers should keep things longer; here each layer has its own, which starts at lower_bound. The norm is over all
heads together. Weights are named as in fla, where lower_bounds is the whole model's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.lines import add_lines, line_slots, lines_reference, run_lines
from slipstream.layers.norm import RMSNorm
from slipstream.layers.short_conv import ShortConv
from slipstream.ops.outer_scan import outer_flops, outer_scan, outer_step


class HGRN2(Mixer, name="hgrn2", family="linear"):
    paper = "Qin et al. 2024, arXiv:2404.07904; the same as code: authors' README, fla"
    use_when = "a recurrent network needs a large state with few parameters, each channel forgetting at its own pace"
    writes, erases = "(1 - f) i^T", "nothing"
    decays, reads = "a number a key channel, from x", "S^T q"
    train_order, decode_order = "T", "1"
    symbols = {"f": "exp(log_decay)", "b": "sigmoid(lower_bound)", "i": "the value line", "o": "q"}
    oracle = "naive_recurrent_gla of fla 0.6.0 within its HGRN2 layer, tests/oracles/feature_attention.npz"
    no_weight_decay = ("lower_bound",)

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 128: the width of a head is the paper's expand ratio
        lower_bound: float = Field(0.5, gt=0, lt=1)  # where each forget gate's least value starts
        conv_size: int = 0  # width of a short convolution on the three lines; 0 for none, as in the paper
        norm_eps: float = 1e-5  # of the output norm
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_heads=2, lower_bound=0.3, conv_size=3, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads = heads(config.d_model, config.n_heads, 128)
        self.head_dim = config.d_model // self.n_heads
        add_lines(self, dict.fromkeys("qfi", config.d_model), conv_size=0)
        for name in "qfi" if config.conv_size else "":
            self.add_module(f"{name}_conv1d", ShortConv(config.d_model, config.conv_size, activation=False))
        start = math.log(config.lower_bound / (1 - config.lower_bound))
        self.lower_bound = nn.Parameter(torch.full((config.d_model,), start))
        self.g_norm = RMSNorm(config.d_model, config.norm_eps)
        self.o_proj = Linear(config.d_model, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        return {"S": Slot((self.n_heads, self.head_dim, self.head_dim)), **line_slots(self)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        lines, convs = run_lines(self, "qfi", x, state, lengths)
        scale, chunk_size = self.head_dim**-0.5, self.config.chunk_size
        o, S = outer_scan(*self._gated(lines), state["S"], lengths, scale, chunk_size)
        return self._output(o), state.advance(x.shape[1] if lengths is None else lengths, S=S, **convs)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        lines, convs = run_lines(self, "qfi", x, state, None)
        o, S = outer_step(*self._gated(lines), state["S"], self.head_dim**-0.5)
        return self._output(o), state.advance(1, S=S, **convs)

    def _gated(self, lines: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, 1 - f, i and log f by heads; the gates in float32 at least, each without a difference of near numbers."""
        wide = torch.promote_types(lines["f"].dtype, torch.float32)
        f, b = lines["f"].to(wide), self.lower_bound.to(wide)
        log_f = torch.logaddexp(F.logsigmoid(b), F.logsigmoid(-b) + F.logsigmoid(f))
        parts = (F.silu(lines["q"]), (-b).sigmoid() * (-f).sigmoid(), lines["i"], log_f)
        q, k, v, log_decay = (t.unflatten(-1, (self.n_heads, self.head_dim)) for t in parts)
        return q, k, v, log_decay

    def _output(self, o: Float[Tensor, "B T H V"]) -> Float[Tensor, "B T D"]:
        return self.o_proj(self.g_norm(o.flatten(2)))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        lines, b = lines_reference(self, "qfi", x), self.lower_bound.sigmoid()
        lines = {"q": F.silu(lines["q"]), "f": b + (1 - b) * lines["f"].sigmoid(), "i": lines["i"]}
        q, f, i = (line.unflatten(-1, (self.n_heads, self.head_dim)) for line in lines.values())
        S, outs = i.new_zeros(*f[:, 0].shape, self.head_dim), []
        for t in range(x.shape[1]):
            S = torch.diag_embed(f[:, t]) @ S + torch.einsum("bhk,bhv->bhkv", 1 - f[:, t], i[:, t])
            outs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) / self.head_dim**0.5)
        return self._output(torch.stack(outs, 1))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        K = self.head_dim
        return outer_flops(T, B, self.n_heads, K, K, mode, "channel", self.config.chunk_size)
