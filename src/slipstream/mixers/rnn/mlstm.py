r"""mLSTM of xLSTM: a matrix memory under an exponential input gate, so that one token can outweigh all before it.

    C_t = f_t C_{t-1} + i_t v_t k_t^T      n_t = f_t n_{t-1} + i_t k_t      h_t = C_t q_t / max(|n_t . q_t|, 1)

    i_t = exp(i~_t)      f_t = sigmoid(f~_t)      q_t = W_q x_t / sqrt(K)      i~, f~ = 15 tanh((w . x_t + b) / 15)
    y_t = W_o (sigmoid(W_z x_t) * norm_h(h_t))

C and n are kept times exp(-m), m_t = max(log f_t + m_{t-1}, i~_t), and the 1 is exp(-m_t): no exponent is above 0. The
layer is that of xLSTM-7B, with its soft cap, its 1e-6 beside the normaliser and its start of the gates. Its up- and
down-projection, like the first paper's, is left to the block around it. n is the last column of the kept matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.config import MixerConfig, heads
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.head_norm import HeadNorm
from slipstream.layers.linear import Linear
from slipstream.layers.lines import add_lines, line_slots, lines_reference, run_lines
from slipstream.ops.outer_scan import outer_flops, outer_scan, outer_step
from slipstream.ops.valid import valid_mask, zero_padding

EPS = 1e-6  # beside the normaliser, as in the code that trained xLSTM-7B
FORGET_BIAS = (3.0, 6.0)  # from the first head to the last: memories of about 20 to 400 tokens


class MLSTM(Mixer, name="mlstm", family="rnn"):
    paper = "Beck et al. 2024, arXiv:2405.04517, sec. 2.3; the layer of xLSTM-7B: Beck et al. 2025, arXiv:2503.13427"
    use_when = "constant memory where single tokens must be able to overrule everything read so far, or be ignored"
    train_order, decode_order = "T", "1"
    writes = "i v k^T"
    erases = "nothing"
    decays = "a number a head, from x"
    reads = "C q / max(|n . q|, 1)"
    symbols = {"C": "S without its last column", "n": "the last column of S", "m": "slot m", "W_z": "ogate_proj"}
    oracle = "transformers xLSTMLayer with copied weights, tests/oracles/test_xlstm_ttt_oracles.py"

    class Config(MixerConfig):
        n_heads: int | None = None  # heads; default d_model / 64
        expand_k: float = 1.0  # width of all queries and of all keys as a multiple of d_model; xLSTM-7B takes 0.5
        conv_size: int = 4  # width of the short convolution on q and k (first paper); 0 for none (xLSTM-7B)
        gate_soft_cap: float = 15.0  # both gates' pre-activations stay within plus and minus this
        input_bias: float = -10.0  # start of the input gate's bias: far below 0, the normaliser stays 1 at first
        norm_eps: float = 1e-6  # of the norm over each head
        chunk_size: int = 64  # tokens computed at once; changes speed, not results

    config: Config
    tiny = Config(d_model=16, n_heads=2, expand_k=0.5, conv_size=3, input_bias=0.0, chunk_size=4)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.n_heads = heads(config.d_model, config.n_heads)
        k_width = round(config.d_model * config.expand_k)
        if k_width % self.n_heads or not k_width:
            raise InputError(f"key width {k_width} (d_model * expand_k) does not divide into n_heads {self.n_heads}")
        self.k_head_dim, self.v_head_dim = k_width // self.n_heads, config.d_model // self.n_heads
        add_lines(self, {"q": k_width, "k": k_width}, config.conv_size)
        add_lines(self, {"v": config.d_model}, 0)
        self.ogate_proj = Linear(config.d_model, config.d_model, bias=False)
        self.igate_proj, self.fgate_proj = (Linear(config.d_model, self.n_heads) for _ in range(2))
        self.norm = HeadNorm(self.n_heads, config.d_model, config.norm_eps)
        self.o_proj = Linear(config.d_model, config.d_model, bias=False)
        self._start_gates()

    @torch.no_grad()
    def _start_gates(self) -> None:
        """At first the gates do not read the input: every head writes alike and forgets at a pace of its own."""
        for gate in (self.igate_proj, self.fgate_proj):
            gate.weight.zero_()
        self.igate_proj.bias.fill_(self.config.input_bias)
        self.fgate_proj.bias.copy_(torch.linspace(*FORGET_BIAS, self.n_heads))

    def slots(self) -> dict[str, Slot]:
        S = Slot((self.n_heads, self.k_head_dim, self.v_head_dim + 1))  # the last column is n
        return {"S": S, "m": Slot((self.n_heads,), start=-torch.inf), **line_slots(self)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        lines, convs = run_lines(self, "qkv", x, state, lengths)
        q, k, v = self._by_heads(lines)
        write, log_decay, m, last = self._stabilised(x, state["m"], lengths)
        v1, scale = F.pad(v, (0, 1), value=1.0), self.k_head_dim**-0.5
        o, S = outer_scan(q, write * k, v1, log_decay, state["S"], lengths, scale, self.config.chunk_size)
        return self._output(o, m, x), state.advance(x.shape[1] if lengths is None else lengths, S=S, m=last, **convs)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        lines, convs = run_lines(self, "qkv", x, state, None)
        q, k, v = self._by_heads(lines)
        write, log_decay, m, last = self._stabilised(x, state["m"], None)
        o, S = outer_step(q, write * k, F.pad(v, (0, 1), value=1.0), log_decay, state["S"], self.k_head_dim**-0.5)
        return self._output(o, m, x), state.advance(1, S=S, m=last, **convs)

    def _by_heads(self, lines: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """q, k, v in float32 at least."""
        wide = torch.promote_types(lines["q"].dtype, torch.float32)
        return tuple(lines[n].to(wide).unflatten(-1, (self.n_heads, -1)) for n in "qkv")

    def _gates(self, x: Tensor) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B T H"]]:
        """i~ and log f."""
        cap, wide = self.config.gate_soft_cap, torch.promote_types(x.dtype, torch.float32)
        i, f = (cap * torch.tanh(gate(x).to(wide) / cap) for gate in (self.igate_proj, self.fgate_proj))
        return i, F.logsigmoid(f)

    def _stabilised(self, x: Tensor, entering: Float[Tensor, "B H"], lengths: Int[Tensor, "B"] | None):
        """i e^-m (B T H 1), the log decay that f and m make, m (B T H), and the m that leaves."""
        i, log_f = self._gates(x)
        i, log_f = zero_padding(i, lengths), zero_padding(log_f, lengths)
        so_far = self._running_max(i, log_f, entering, lengths)
        before, m = so_far[:, :-1], torch.where(so_far.isinf(), 0.0, so_far)[:, 1:]  # -inf: nothing has been read
        log_decay = torch.where(before.isinf(), 0.0, log_f + before - m).clamp(max=0.0)
        return (i - m).clamp(max=0.0).exp()[..., None], log_decay, m, so_far[:, -1]

    def _running_max(self, i: Tensor, log_f: Tensor, entering: Tensor, lengths: Int[Tensor, "B"] | None) -> Tensor:
        """m before the first token and after each: F_t + max(m_0, max_s (i~_s - F_s)), F the sum of log f.

        F grows with T while m does not: the difference is taken in float64.
        """
        if lengths is not None:
            i = i.masked_fill(~valid_mask(lengths, i.shape[1])[..., None], -torch.inf)
        total = F.pad(log_f.double().cumsum(1), (0, 0, 1, 0))
        above = torch.cat([entering[:, None].double(), i - total[:, 1:]], 1).cummax(1).values
        return (total + above).to(entering.dtype)

    def _output(self, o: Float[Tensor, "B T H V1"], m: Float[Tensor, "B T H"], x: Tensor) -> Float[Tensor, "B T D"]:
        """Divide by the normaliser, which came along as the last channel."""
        h = o[..., :-1] / (torch.maximum(o[..., -1:].abs(), (-m).exp()[..., None]) + EPS)
        return self.o_proj(torch.sigmoid(self.ogate_proj(x)) * self.norm(h.to(x.dtype)))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self._by_heads(lines_reference(self, "qkv", x))
        i, log_f = self._gates(x)
        C, n, m, hs = v.new_zeros(*v[:, 0].shape, self.k_head_dim), torch.zeros_like(k[:, 0]), i[:, 0] - torch.inf, []
        for t in range(x.shape[1]):
            before, m = m, torch.maximum(log_f[:, t] + m, i[:, t])
            keep, write = (log_f[:, t] + before - m).exp()[..., None], (i[:, t] - m).exp()[..., None]
            C = keep[..., None] * C + write[..., None] * torch.einsum("bhv,bhk->bhvk", v[:, t], k[:, t])
            n = keep * n + write * k[:, t]
            scaled = q[:, t] / self.k_head_dim**0.5
            norm = torch.maximum((n * scaled).sum(-1).abs(), (-m).exp()) + EPS
            hs.append(torch.einsum("bhvk,bhk->bhv", C, scaled) / norm[..., None])
        return self.o_proj(torch.sigmoid(self.ogate_proj(x)) * self.norm(torch.stack(hs, 1).to(x.dtype)))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        K, V = self.k_head_dim, self.v_head_dim + 1
        return outer_flops(T, B, self.n_heads, K, V, mode, "head", self.config.chunk_size)
