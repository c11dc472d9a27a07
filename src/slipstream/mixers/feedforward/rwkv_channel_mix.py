r"""RWKV channel mix: a squared ReLU layer with a gate, both reading a blend of this token and the last.

    y_t = sigmoid(W_r z_r) * (W_v relu(W_k z_k)^2)        z_n = m_n * x_t + (1 - m_n) * x_{t-1}

The feed-forward of RWKV-4, 5 and 6, as in `rwkv6/rwkv_channel_mix` of a pattern; its memory is the last token's input.
Weights are named as in Hugging Face's rwkv (time_mix_key, receptance); RWKV-6 stores 1 - m.
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


class RWKVChannelMix(Mixer, name="rwkv_channel_mix", family="feedforward"):
    paper = "Peng et al. 2023, arXiv:2305.13048, sec. 3.1; Peng et al. 2024, arXiv:2404.05892, sec. 4.1"
    use_when = "a feed-forward that also sees the last token: what RWKV-4, 5 and 6 put after each time mix"
    writes, erases = "x, beside nothing", "nothing"
    decays, reads = "all of it, after one token", "m * x_t + (1 - m) * x_{t-1}"
    train_order, decode_order = "T", "1"
    symbols = {"W_k": "key", "W_v": "value", "W_r": "receptance", "m_r": "time_mix_receptance", "m_k": "time_mix_key"}
    oracle = "transformers RwkvFeedForward with copied weights, tests/oracles/test_rwkv_oracles.py"
    no_weight_decay = ("time_mix_key", "time_mix_receptance")

    class Config(MixerConfig):
        d_ff: int | None = Field(None, ge=1)  # inner width; default 3.5 d_model, as in RWKV-5 and 6

    config: Config
    tiny = Config(d_model=16, d_ff=20)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D, d_ff = config.d_model, config.d_ff or config.d_model * 7 // 2
        self.time_mix_key, self.time_mix_receptance = nn.Parameter(ramp(D, 1.0)), nn.Parameter(ramp(D, 1.0))
        self.key, self.value = Linear(D, d_ff, bias=False), Linear(d_ff, D, bias=False)
        self.receptance = Linear(D, D, bias=False)

    def slots(self) -> dict[str, Slot]:
        return {"shift": shift_slot(self.config.d_model)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        line = after(state["shift"], x)
        tokens = x.shape[1] if lengths is None else lengths
        return self._mix(x, line[:, :-1]), state.advance(tokens, shift=last_tokens(line, 1, lengths))

    def _mix(self, x: Float[Tensor, "B T D"], previous: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        k = self.key(blend(previous, x, self.time_mix_key))
        r = self.receptance(blend(previous, x, self.time_mix_receptance))
        return r.sigmoid() * self.value(k.relu().square())

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        last = F.pad(x, (0, 0, 1, 0))[:, :-1]
        z_k, z_r = (m * x + (1 - m) * last for m in (self.time_mix_key, self.time_mix_receptance))
        squared = (z_k @ self.key.weight.T).clamp(min=0) ** 2
        return (z_r @ self.receptance.weight.T).sigmoid() * (squared @ self.value.weight.T)
