r"""The neural memory of Titans: a network trained while it reads, with momentum and with forgetting.

    Z_t = eta_t Z_{t-1} - theta_t grad l_t(M_0)        M_t = (1 - alpha_t) M_{t-1} + Z_t        o_t = f(q_t; M_t)

    l_t(M) = |f(k_t; M) - v_t|^2 / 2       f(x; M) = LN(M_L gelu(... M_1 x)) + x      theta_t = lr sigmoid(w . x_t + c) / K
    eta_t, alpha_t = sigmoid(w . x_t + c)     q, k, v = silu(conv(W x))  with q, k of unit length
    y_t = W_o (rmsnorm(o_t) * silu(W_g x_t))

All gradients of a mini-batch are taken at M_0, the memory with which it began (section 3.2 of the paper); the mini-batch is
part of the definition, its borders at multiples of its size. The paper leaves out LN and the residual around the memory;
with them, as fla and titans-pytorch have it, no step can blow the memory up. Its combinations with attention (MAC, MAG,
MAL) and its persistent tokens are not here. The start of M is learned.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.lines import add_lines, line_slots, lines_reference, run_lines, silu_unless_convolved
from slipstream.layers.norm import GatedRMSNorm
from slipstream.ops.inner_sgd import (
    Layers,
    MomentumState,
    Net,
    inner_sgd_flops,
    momentum_reference,
    momentum_sgd,
    momentum_step,
)
from slipstream.ops.l2_norm import l2_norm

KINDS = "moved", "ahead", "momentum"  # what the state holds of every matrix: M_0 less its start, M_t - M_0, Z_t
FORGETTING = (-7.0, -3.0)  # start of alpha's bias, from the first head to the last: memories of about 1000 to 20 tokens


class Titans(Mixer, name="titans", family="ttt"):
    paper = "Behrouz, Zhong, Mirrokni 2024, arXiv:2501.00663, sec. 3.1-3.2; norm and residual of the memory: fla, titans-pytorch"
    use_when = "long contexts where surprise should decide what is kept, and old content must make room by itself"
    train_order, decode_order = "T", "1"
    writes = "- theta grad l(M_0), with momentum eta"
    erases = "what M_0 already tells of k"
    decays = "a number a head, from x"
    reads = "LN(M_L gelu(... M_1 q)) + q"
    symbols = {"S": "Z, slots momentum", "theta": "lr", "M_0": "M plus the slots moved", "b": "mini_batch"}
    oracle = "eq. of sec. 3.1 with gradients by hand in numpy; rates: combine_params of fla 0.6.0, xlstm_ttt.npz"
    no_weight_decay = ("norm_weight", "norm_bias")

    class Config(MixerConfig):
        n_heads: int | None = None  # heads, each with a memory of its own; default d_model / 64
        depth: int = Field(2, ge=1)  # layers of the memory; 1 is a matrix
        expand: float = 2.0  # width of the memory's hidden layers as a multiple of head_dim
        mini_batch: int = Field(16, ge=1)  # tokens whose gradients are taken at the same memory; part of the definition
        base_lr: float = 0.3  # factor on theta
        memory_eps: float = 0.1  # beside the variance in LN: a memory that has faded reads as nothing, not as noise
        conv_size: int = 4  # width of the short convolution on q, k and v; 0 for none
        norm_eps: float = 1e-6  # of the output norm

    config: Config
    tiny = Config(d_model=16, n_heads=2, depth=2, mini_batch=4, conv_size=3)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads = heads(config.d_model, config.n_heads)
        self.head_dim = config.d_model // self.n_heads
        hidden = [round(self.head_dim * config.expand)] * (config.depth - 1)
        self.shapes = list(pairwise([self.head_dim, *hidden, self.head_dim]))
        self.M = nn.ParameterList(torch.randn(self.n_heads, i, o) * i**-0.5 for i, o in self.shapes)
        self.norm_weight = nn.Parameter(torch.ones(self.n_heads, self.head_dim))
        self.norm_bias = nn.Parameter(torch.zeros(self.n_heads, self.head_dim))
        add_lines(self, dict.fromkeys("qkv", config.d_model), config.conv_size)
        self.theta_proj, self.eta_proj, self.alpha_proj = (Linear(config.d_model, self.n_heads) for _ in range(3))
        self.alpha_proj.bias.data = torch.linspace(*FORGETTING, self.n_heads)
        self.g_proj, self.o_proj = (Linear(config.d_model, config.d_model, bias=False) for _ in range(2))
        self.o_norm = GatedRMSNorm(self.head_dim, config.norm_eps)

    def slots(self) -> dict[str, Slot]:
        matrices = [Slot((self.n_heads, *shape)) for shape in self.shapes]
        return {f"{kind}_{n}": m for kind in KINDS for n, m in enumerate(matrices, 1)} | line_slots(self)

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        lines, convs = run_lines(self, "qkv", x, state, lengths)
        q, k, v = self._by_heads(lines)
        memory, M = self._memory(state), self.config.mini_batch
        o, memory = momentum_sgd(q, k, v, *self._rates(x), M, self._net(), memory, state.length, lengths)
        return self._output(o, x), state.advance(x.shape[1] if lengths is None else lengths, **_named(memory), **convs)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        lines, convs = run_lines(self, "qkv", x, state, None)
        q, k, v = self._by_heads(lines)
        memory, M = self._memory(state), self.config.mini_batch
        o, memory = momentum_step(q, k, v, *self._rates(x), M, self._net(), memory, state.length)
        return self._output(o, x), state.advance(1, **_named(memory), **convs)

    def _by_heads(self, lines: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """In float32 at least: what is written is read through a norm, which magnifies errors."""
        act, wide = silu_unless_convolved(self), torch.promote_types(lines["q"].dtype, torch.float32)
        q, k, v = (act(lines[n].to(wide)).unflatten(-1, (self.n_heads, self.head_dim)) for n in "qkv")
        return l2_norm(q), l2_norm(k), v

    def _rates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """theta, log eta and log(1 - alpha), in float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        theta, eta, alpha = (p(x).to(wide) for p in (self.theta_proj, self.eta_proj, self.alpha_proj))
        return theta.sigmoid() * self.config.base_lr / self.head_dim, F.logsigmoid(eta), F.logsigmoid(-alpha)

    def _net(self) -> Net:
        return Net(tuple(self.M), self.norm_weight, self.norm_bias, False, self.config.memory_eps)

    def _memory(self, state: State) -> MomentumState:
        moved, ahead, momentum = (_layers(state, kind, len(self.shapes)) for kind in KINDS)
        return moved, ahead, momentum

    def _output(self, o: Float[Tensor, "B T H K"], x: Tensor) -> Float[Tensor, "B T D"]:
        return self.o_proj(self.o_norm(o.to(x.dtype), self.g_proj(x).unflatten(-1, o.shape[2:])).flatten(2))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self._by_heads(lines_reference(self, "qkv", x))
        return self._output(momentum_reference(q, k, v, *self._rates(x), self.config.mini_batch, self._net()), x)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return inner_sgd_flops(T, B, self.n_heads, self.shapes, False, self.config.mini_batch, True, mode)


def _layers(state: State, kind: str, depth: int) -> Layers:
    return tuple(state[f"{kind}_{n + 1}"] for n in range(depth))


def _named(memory: MomentumState) -> dict[str, Tensor]:
    return {f"{kind}_{n}": t for kind, layers in zip(KINDS, memory) for n, t in enumerate(layers, 1)}
