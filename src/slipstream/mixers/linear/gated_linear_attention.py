r"""Gated linear attention (GLA): a matrix state with a forget gate for every key channel.

    S_t = S_{t-1} D(alpha_t) + v_t k_t^T        o_t = S_t q_t / sqrt(K)

    alpha_t = sigmoid(W_2 W_1 x_t + b)^(1/16)        y_t = W_o (rmsnorm(o_t) * silu(W_g x_t))

The key width is half the value width, and the gate is of low rank, as in the paper. Weights are named as in fla
(q_proj, gk_proj, g_proj, g_norm_swish_gate). Not grouped latent attention, which shares the abbreviation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.lines import add_lines, line_slots, lines_reference, run_lines
from slipstream.layers.norm import GatedRMSNorm
from slipstream.ops.outer_scan import outer_flops, outer_scan, outer_step


class GatedLinearAttention(Mixer, name="gated_linear_attention", family="linear"):
    paper = "Yang, Wang, Shen, Panda, Kim 2023, arXiv:2312.06635, eq. 3 and sec. 4.4"
    use_when = "long texts in constant memory where old content fades at its own pace; the delta rule recalls more"
    writes, erases = "v k^T", "nothing"
    decays, reads = "a number a key channel, from x", "S q"
    train_order, decode_order = "T", "1"
    symbols = {"S": "S", "alpha": "exp(log_decay)", "tau": "gate_normaliser", "r": "silu(g_proj x)"}
    oracle = "the parallel form in numpy, tests/oracles/linear_attention.npz; its op: naive_recurrent_gla of fla 0.6.0, fla_ops.npz"

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        expand_k: float = 0.5  # width of all keys as a multiple of d_model
        expand_v: float = 1.0  # width of all values as a multiple of d_model
        gate_rank: int = 16  # rank of the forget gate's projection
        gate_normaliser: float = 16.0  # the gate's logarithm is divided by this, which keeps it near 1
        conv_size: int = 0  # width of a short convolution on q, k and v; 0 for none, as in the paper
        norm_eps: float = 1e-5  # of the output norm
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_heads=2, gate_rank=3, gate_normaliser=2.0, conv_size=3, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads = heads(config.d_model, config.n_heads)
        expand = {"q": config.expand_k, "k": config.expand_k, "v": config.expand_v}
        widths = {name: round(config.d_model * by) for name, by in expand.items()}
        for name, width in widths.items():
            if width % self.n_heads:
                raise InputError(f"width {width} of {name} does not divide into n_heads {self.n_heads}; change one")
        self.k_head_dim, self.v_head_dim = widths["k"] // self.n_heads, widths["v"] // self.n_heads
        add_lines(self, widths, config.conv_size)
        low, high = Linear(config.d_model, config.gate_rank, bias=False), Linear(config.gate_rank, widths["k"])
        self.gk_proj = nn.Sequential(low, high)
        self.g_proj = Linear(config.d_model, widths["v"], bias=False)
        self.g_norm_swish_gate = GatedRMSNorm(self.v_head_dim, config.norm_eps)
        self.o_proj = Linear(widths["v"], config.d_model, bias=False)

    def slots(self) -> dict[str, Slot]:
        return {"S": Slot((self.n_heads, self.k_head_dim, self.v_head_dim)), **line_slots(self)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        lines, convs = run_lines(self, "qkv", x, state, lengths)
        scale, chunk_size = self.k_head_dim**-0.5, self.config.chunk_size
        o, S = outer_scan(*self._by_heads(lines), self._log_decay(x), state["S"], lengths, scale, chunk_size)
        return self._output(o, x), state.advance(x.shape[1] if lengths is None else lengths, S=S, **convs)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        lines, convs = run_lines(self, "qkv", x, state, None)
        o, S = outer_step(*self._by_heads(lines), self._log_decay(x), state["S"], self.k_head_dim**-0.5)
        return self._output(o, x), state.advance(1, S=S, **convs)

    def _by_heads(self, lines: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (lines[n].unflatten(-1, (self.n_heads, -1)) for n in "qkv")
        return q, k, v

    def _log_decay(self, x: Tensor) -> Float[Tensor, "B T H K"]:
        logits = self.gk_proj(x).unflatten(-1, (self.n_heads, self.k_head_dim))
        return F.logsigmoid(logits.to(torch.promote_types(x.dtype, torch.float32))) / self.config.gate_normaliser

    def _output(self, o: Float[Tensor, "B T H V"], x: Tensor) -> Float[Tensor, "B T D"]:
        return self.o_proj(self.g_norm_swish_gate(o, self.g_proj(x).unflatten(-1, o.shape[2:])).flatten(2))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self._by_heads(lines_reference(self, "qkv", x))
        alpha = self.gk_proj(x).sigmoid().pow(1 / self.config.gate_normaliser).unflatten(-1, k.shape[2:])
        S, outs = v.new_zeros(*v[:, 0].shape, self.k_head_dim), []  # (B H V K): the paper's S
        for t in range(x.shape[1]):
            S = S @ torch.diag_embed(alpha[:, t]) + torch.einsum("bhv,bhk->bhvk", v[:, t], k[:, t])
            outs.append(torch.einsum("bhvk,bhk->bhv", S, q[:, t]) / self.k_head_dim**0.5)
        return self._output(torch.stack(outs, 1), x)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        K, V = self.k_head_dim, self.v_head_dim
        return outer_flops(T, B, self.n_heads, K, V, mode, "channel", self.config.chunk_size)
