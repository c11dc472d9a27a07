r"""RWKV-4: a weighted mean of all values, where weights fade by channel and the token at hand has a bonus.

    a_t = e^{-w} a_{t-1} + e^{k_t} v_t        b_t = e^{-w} b_{t-1} + e^{k_t}
    wkv_t = (a_{t-1} + e^{u+k_t} v_t) / (b_{t-1} + e^{u+k_t})

    y_t = W_o (sigmoid(r_t) * wkv_t)        r_t = W_r (m_r * x_t + (1 - m_r) * x_{t-1}),  k_t and v_t likewise

Both sums are kept times e^{-p}, p a running maximum of their exponents, so that no key is too large. The decay is
w = e^time_decay and the bonus u = time_first. Weights are named as in Hugging Face's rwkv (time_mix_key, receptance), and
drawn as RWKV-LM draws a first layer's. The channel mix is a mixer of its own.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.mixer import Mixer
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.layers.token_shift import after, blend, ramp, shift_slot
from slipstream.ops.valid import last_tokens
from slipstream.ops.wkv_scan import LEAST, wkv_scan


class RWKV4(Mixer, name="rwkv4", family="linear"):
    paper = "Peng et al. 2023, arXiv:2305.13048, eq. 11-18; stable form: appendix D"
    use_when = "the smallest state of all language models that work, two numbers a channel; checkpoints of RWKV-4"
    writes, erases = "e^k v", "nothing"
    decays, reads = "a fixed number a channel", "a / b, with a bonus for the token itself"
    train_order, decode_order = "T", "1"
    symbols = {
        "w": "exp(time_decay)",
        "u": "time_first",
        "a": "num",
        "b": "den",
        "p": "top",
        "m_r": "time_mix_receptance",
    }
    oracle = "transformers RwkvSelfAttention with copied weights, tests/oracles/test_rwkv_oracles.py"
    no_weight_decay = ("time_decay", "time_first", "time_mix_key", "time_mix_value", "time_mix_receptance")

    class Config(MixerConfig):
        d_inner: int | None = None  # width of keys, values and state; default d_model

    config: Config
    tiny = Config(d_model=16, d_inner=12)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D, inner = config.d_model, config.d_inner or config.d_model
        line = torch.linspace(0, 1, inner)
        self.time_decay = nn.Parameter(-5 + 8 * line**0.7)
        self.time_first = nn.Parameter(math.log(0.3) + 0.5 * ((torch.arange(inner) + 1) % 3 - 1))
        self.time_mix_key, self.time_mix_value = nn.Parameter(ramp(D, 1.0)), nn.Parameter(ramp(D, 1.0))
        self.time_mix_receptance = nn.Parameter(ramp(D, 0.5))
        self.key, self.value, self.receptance = (Linear(D, inner, bias=False) for _ in range(3))
        self.output = Linear(inner, D, bias=False)

    def slots(self) -> dict[str, Slot]:
        width = self.key.out_features
        sums = {"num": Slot((width,)), "den": Slot((width,)), "top": Slot((width,), start=LEAST)}
        return {**sums, "shift": shift_slot(self.config.d_model)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        line = after(state["shift"], x)
        r, k, v = self._project(x, line[:, :-1])
        w, u = self.time_decay.to(k.dtype).exp(), self.time_first.to(k.dtype)
        y, sums = wkv_scan(k, v, w, u, (state["num"], state["den"], state["top"]), lengths)
        tokens = x.shape[1] if lengths is None else lengths
        kept = dict(zip(("num", "den", "top"), sums), shift=last_tokens(line, 1, lengths))
        return self.output(r * y.to(r.dtype)), state.advance(tokens, **kept)

    def _project(self, x: Float[Tensor, "B T D"], previous: Float[Tensor, "B T D"]) -> tuple[Tensor, Tensor, Tensor]:
        """r, k, v, the last two in float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        r = self.receptance(blend(previous, x, self.time_mix_receptance)).sigmoid()
        k = self.key(blend(previous, x, self.time_mix_key)).to(wide)
        return r, k, self.value(blend(previous, x, self.time_mix_value)).to(wide)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        r, k, v = self._project(x, nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])
        w, u, outs = self.time_decay.exp(), self.time_first, []
        a = b = torch.zeros_like(k[:, 0])
        for t in range(x.shape[1]):
            own = (u + k[:, t]).exp()
            outs.append((a + own * v[:, t]) / (b + own))
            a, b = (-w).exp() * a + k[:, t].exp() * v[:, t], (-w).exp() * b + k[:, t].exp()
        return self.output(r * torch.stack(outs, 1))
