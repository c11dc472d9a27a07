r"""MesaNet: at every token the linear map that fits all pairs seen so far best, and its answer to the query.

    G_t = gamma_t G_{t-1} + beta_t v_t k_t^T        R_t = gamma_t R_{t-1} + beta_t k_t k_t^T

    o_t = G_t (R_t + D(lam))^-1 q_t        by n_steps of conjugate gradients from zero

    gamma = sigmoid(W_a x + a)  beta = sigmoid(W_b x + b)  q, k = unit(silu(conv(W x)))  v = W_v x  y = W_o rmsnorm(o)
    lam = lam_min + softplus(l), a number a key channel

G (R + D)^-1 minimises sum_s gamma.. beta_s |W k_s - v_s|^2 + |W D^(1/2)|^2 over W: ridge regression with forgetting. DeltaNet
takes one gradient step a token towards it. Work grows with n_steps. Weights are named as in fla (lambda_params is l).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.lines import add_lines, line_slots, lines_reference, run_lines, silu_unless_convolved
from slipstream.layers.norm import RMSNorm
from slipstream.ops.l2_norm import l2_norm
from slipstream.ops.mesa_scan import mesa_flops, mesa_scan, mesa_step
from slipstream.ops.mesa_scan import reference as mesa_reference
from slipstream.ops.silu_gate import silu_gate


class MesaNet(Mixer, name="mesanet", family="ttt"):
    paper = "von Oswald et al. 2025, arXiv:2506.05233"
    use_when = (
        "constant memory should be used as well as it can be, and some thirty times the work of its read is affordable"
    )
    writes, erases = "beta v k^T to G, beta k k^T to R", "nothing; R weighs it at the read"
    decays, reads = "a number a head, from x", "G (R + D(lam))^-1 q"
    train_order, decode_order = "T", "1"
    symbols = {"G": "G transposed", "H": "R", "R": "R", "Lambda": "lam", "gamma": "exp(log_decay)", "beta": "beta"}
    oracle = "naive_mesa_net_exact and one-step decoding of fla 0.6.0, tests/oracles/delta_family.npz"
    no_weight_decay = ("lambda_params",)

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        head_dim: int | None = None  # width per head of q, k and v; default d_model / n_heads
        n_steps: int = 30  # steps of conjugate gradients; no more than head_dim are ever of use
        lam_min: float = 0.25  # lower bound of lam, which keeps the inverse tame
        output_gate: bool = False  # multiply the normalised output by silu(W_g x)
        conv_size: int = 4  # width of the short convolution on q and k; 0 for none
        norm_eps: float = 1e-5  # of the output norm
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_heads=2, head_dim=6, n_steps=4, output_gate=True, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads = config.n_heads or heads(config.d_model, None)
        self.head_dim = config.head_dim or config.d_model // heads(config.d_model, self.n_heads)
        if not 0 < config.lam_min < 1:
            raise InputError(f"lam_min {config.lam_min}: lam starts at 1, and stays above a bound between 0 and 1")
        D, width = config.d_model, self.n_heads * self.head_dim
        add_lines(self, {"q": width, "k": width}, config.conv_size)
        add_lines(self, {"v": width}, 0)
        self.a_proj, self.b_proj = Linear(D, self.n_heads), Linear(D, self.n_heads)
        self.lambda_params = nn.Parameter(torch.full((width,), math.log(math.expm1(1 - config.lam_min))))
        self.g_proj = Linear(D, width, bias=False) if config.output_gate else None
        self.o_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.o_proj = Linear(width, D, bias=False)

    def slots(self) -> dict[str, Slot]:
        """S is R and G side by side, keys along its rows."""
        return {"S": Slot((self.n_heads, self.head_dim, 2 * self.head_dim)), **line_slots(self)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        lines, convs = run_lines(self, "qkv", x, state, lengths)
        steps, chunk_size = self.config.n_steps, self.config.chunk_size
        o, S = mesa_scan(*self._inputs(lines, x), self._lam(), state["S"], lengths, steps, chunk_size)
        return self._output(o, x), state.advance(x.shape[1] if lengths is None else lengths, S=S, **convs)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        lines, convs = run_lines(self, "qkv", x, state, None)
        o, S = mesa_step(*self._inputs(lines, x), self._lam(), state["S"], self.config.n_steps)
        return self._output(o, x), state.advance(1, S=S, **convs)

    def _inputs(self, lines: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v by heads, beta and log_decay."""
        act = silu_unless_convolved(self)
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)) for t in (act(lines["q"]), act(lines["k"]), lines["v"]))
        wide = torch.promote_types(x.dtype, torch.float32)
        return l2_norm(q), l2_norm(k), v, self.b_proj(x).sigmoid(), F.logsigmoid(self.a_proj(x).to(wide))

    def _lam(self) -> Float[Tensor, "H K"]:
        return (self.config.lam_min + F.softplus(self.lambda_params)).unflatten(0, (self.n_heads, -1))

    def _output(self, o: Float[Tensor, "B T H V"], x: Tensor) -> Float[Tensor, "B T D"]:
        y = self.o_norm(o).flatten(2)
        return self.o_proj(silu_gate(y, self.g_proj(x)) if self.g_proj else y)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        inputs = self._inputs(lines_reference(self, "qkv", x), x)
        return self._output(mesa_reference(*inputs, self._lam(), self.config.n_steps)[0], x)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        sizes = self.n_heads, self.head_dim, self.head_dim
        return mesa_flops(T, B, *sizes, mode, self.config.n_steps, self.config.chunk_size)
