r"""RetNet: retention, linear attention that forgets at a fixed pace, a different one in every head.

    S_t = gamma_h S_{t-1} + k_t^T v_t        o_t = q_t S_t        gamma_h = 1 - 2^(-5-h)

    q, k = rope(W x)  with k scaled by K^(-1/2)        y_t = W_o (silu(W_g x_t) * groupnorm_h(o_t))

The rotation is the complex exponential of the paper's eq. 5, in the half-split layout of rope. The paper's score
normalisations are left out: the group norm undoes them. Weights are named as in fla and torchscale (q_proj, g_proj).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.head_norm import HeadNorm
from slipstream.layers.linear import Linear
from slipstream.layers.lines import add_lines, line_slots, lines_reference, run_lines
from slipstream.layers.rope import rope
from slipstream.ops.outer_scan import outer_flops, outer_scan, outer_step
from slipstream.ops.silu_gate import silu_gate


class RetNet(Mixer, name="retnet", family="linear"):
    paper = "Sun et al. 2023, arXiv:2307.08621, eq. 5-8"
    use_when = "constant memory where relevance fades with distance at known rates: signals, sensors, local language"
    writes, erases = "k^T v", "nothing"
    decays, reads = "one fixed number a head", "q S"
    train_order, decode_order = "T", "1"
    symbols = {"S": "S", "gamma": "exp(log_decay)", "Theta": "rope"}
    oracle = "the parallel form in numpy, tests/oracles/linear_attention.npz; its op: naive_retention of fla 0.6.0, fla_ops.npz"

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        expand_v: float = 2.0  # width of all values as a multiple of d_model
        rope_base: float = 10000.0  # base of the rotary positions
        conv_size: int = 0  # width of a short convolution on q, k and v; 0 for none, as in the paper
        norm_eps: float = 1e-5  # of the group norm
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_heads=2, expand_v=1.5, conv_size=3, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads = heads(config.d_model, config.n_heads)
        self.head_dim, v_width = config.d_model // self.n_heads, round(config.d_model * config.expand_v)
        if self.head_dim % 2:
            raise InputError(f"the rotation turns pairs: head_dim {self.head_dim} must be even; change n_heads")
        if v_width % self.n_heads:
            raise InputError(f"value width {v_width} (d_model * expand_v) does not divide into n_heads {self.n_heads}")
        self.v_head_dim = v_width // self.n_heads
        add_lines(self, {"q": config.d_model, "k": config.d_model, "v": v_width}, config.conv_size)
        self.g_proj = Linear(config.d_model, v_width, bias=False)
        self.g_norm = HeadNorm(self.n_heads, v_width, config.norm_eps)
        self.o_proj = Linear(v_width, config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        return {"S": Slot((self.n_heads, self.head_dim, self.v_head_dim)), **line_slots(self)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        lines, convs = run_lines(self, "qkv", x, state, lengths)
        q, k, v = self._by_heads(lines, state.length)
        o, S = outer_scan(q, k, v, self._log_decay(v), state["S"], lengths, self.head_dim**-0.5, self.config.chunk_size)
        return self._output(o, x), state.advance(x.shape[1] if lengths is None else lengths, S=S, **convs)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        lines, convs = run_lines(self, "qkv", x, state, None)
        q, k, v = self._by_heads(lines, state.length)
        o, S = outer_step(q, k, v, self._log_decay(v), state["S"], self.head_dim**-0.5)
        return self._output(o, x), state.advance(1, S=S, **convs)

    def _by_heads(self, lines: dict[str, Tensor], past: Int[Tensor, "B"]) -> tuple[Tensor, Tensor, Tensor]:
        positions = past[:, None] + torch.arange(lines["q"].shape[1], device=past.device)
        q, k, v = (lines[n].unflatten(-1, (self.n_heads, -1)) for n in "qkv")
        return rope(q, positions, self.config.rope_base), rope(k, positions, self.config.rope_base), v

    def _log_decay(self, like: Tensor) -> Float[Tensor, "H"]:
        h = torch.arange(self.n_heads, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
        return torch.log1p(-(2.0 ** (-5 - h)))

    def _output(self, o: Float[Tensor, "B T H V"], x: Tensor) -> Float[Tensor, "B T D"]:
        return self.o_proj(silu_gate(self.g_norm(o), self.g_proj(x)))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self._by_heads(lines_reference(self, "qkv", x), torch.zeros(x.shape[0], dtype=torch.long))
        gamma = (1 - 2.0 ** (-5 - torch.arange(self.n_heads).to(x)))[:, None, None]
        S, outs = v.new_zeros(*k[:, 0].shape, self.v_head_dim), []
        for t in range(x.shape[1]):
            S = gamma * S + k[:, t, :, :, None] * self.head_dim**-0.5 * v[:, t, :, None, :]
            outs.append((q[:, t, :, None, :] @ S).squeeze(-2))
        return self._output(torch.stack(outs, 1), x)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return outer_flops(T, B, self.n_heads, self.head_dim, self.v_head_dim, mode, "head", self.config.chunk_size)
