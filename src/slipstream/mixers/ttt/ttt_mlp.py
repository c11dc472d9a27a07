r"""TTT-MLP: the memory is a network of two layers, trained by gradient descent to tell values from keys.

    W_t = W_0 - e_i sum_s eta_s grad l_s(W_0)        l_s(W) = |f(k_s; W) - v_s|^2 / 2        o_t = f(q_t; W_t)

    f(x; W) = LN(W_2 gelu(W_1 x + b_1) + b_2) + x    eta_t = 0.1 sigmoid(w_lr . x_t + c) / K    e_i = max(0, 1/i + learned_i)
    q, k = rope(conv(W x))  by place i in the mini-batch        y_t = W_o (gelu(W_g x_t) * LN(o_t))

As ttt_linear, but for the hidden layer, four heads wide: eight times the memory, and twice the products a token for each
number of it. W stands for W_1, b_1, W_2 and b_2, all four learned at the start and moved while reading.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.ttt_block import NO_WEIGHT_DECAY, TTTBlock, TTTConfig


class TTTMLP(Mixer, name="ttt_mlp", family="ttt"):
    paper = "Sun et al. 2024, arXiv:2407.04620, sec. 2; step sizes, norms and gate: the authors' ttt-lm-pytorch"
    use_when = "as ttt_linear, where memory must hold what no linear map can, and eight times its size is affordable"
    train_order, decode_order = "T", "1"
    writes = "- e_i eta grad l(W_0)"
    erases = "what W_0 already tells of k"
    decays = "nothing"
    reads = "LN(W_2 gelu(W_1 q + b_1) + b_2) + q"
    symbols = {"eta": "lr", "W_0": "W and b plus the slots moved", "b": "16, mini_batch"}
    oracle = "the rule with its gradients by hand in numpy, tests/oracles/xlstm_ttt.npz"
    no_weight_decay = (*NO_WEIGHT_DECAY, "b2")

    class Config(TTTConfig):
        base_lr: float = 0.1  # factor on eta
        expand: float = 4.0  # width of the hidden layer as a multiple of head_dim

    config: Config
    tiny = Config(d_model=16, n_heads=2, mini_batch=4, conv_size=3, base_lr=0.3, expand=2)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.ttt = TTTBlock(config, [config.expand])

    def slots(self) -> dict[str, Slot]:
        return self.ttt.slots()

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        return self.ttt(x, state, lengths)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        return self.ttt.step(x, state)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.ttt.reference(x)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return self.ttt.op_flops(T, B, mode)
