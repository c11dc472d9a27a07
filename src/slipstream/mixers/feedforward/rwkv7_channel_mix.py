r"""RWKV-7 channel mix: a squared ReLU layer that reads a blend of this token and the last, without a gate.

    y_t = W_v relu(W_k (x_t + mu * (x_{t-1} - x_t)))^2

The feed-forward of RWKV-7, as in `rwkv7/rwkv7_channel_mix` of a pattern; its memory is the last token's input. Weights are
named as in fla (x_k, key, value).
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.mixer import Mixer
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.token_shift import after, blend, ramp, shift_slot
from slipstream.ops.valid import last_tokens


class RWKV7ChannelMix(Mixer, name="rwkv7_channel_mix", family="feedforward"):
    paper = "Peng et al. 2025, arXiv:2503.14456, sec. 4.2"
    use_when = "a feed-forward that also sees the last token: what RWKV-7 puts after each time mix"
    writes, erases = "x, beside nothing", "nothing"
    decays, reads = "all of it, after one token", "x_t + mu * (x_{t-1} - x_t)"
    train_order, decode_order = "T", "1"
    symbols = {"W_k": "key", "W_v": "value", "mu": "x_k"}
    oracle = "RWKV_x070_CMix_seq of the rwkv package 0.8.32, stored in tests/oracles/rwkv7.npz"
    no_weight_decay = ("x_k",)

    class Config(MixerConfig):
        d_ff: int | None = Field(None, ge=1)  # inner width; default 4 d_model

    config: Config
    tiny = Config(d_model=16, d_ff=20)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D, d_ff = config.d_model, config.d_ff or 4 * config.d_model
        self.x_k = nn.Parameter(1 - ramp(D, 4.0).flatten())
        self.key, self.value = Linear(D, d_ff, bias=False), Linear(d_ff, D, bias=False)

    def slots(self) -> dict[str, Slot]:
        return {"shift": shift_slot(self.config.d_model)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        line = after(state["shift"], x)
        y = self.value(self.key(blend(x, line[:, :-1], self.x_k)).relu().square())
        return y, state.advance(x.shape[1] if lengths is None else lengths, shift=last_tokens(line, 1, lengths))

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        blended = x + self.x_k * (F.pad(x, (0, 0, 1, 0))[:, :-1] - x)
        return (blended @ self.key.weight.T).clamp(min=0) ** 2 @ self.value.weight.T
