r"""Sliding-window softmax attention: every token sees the last `window` tokens, itself included.

    o_t = sum_{t-W < s <= t} softmax_s(q_t . k_s / sqrt(K)) v_s

Memory is the last W-1 keys and values, whatever the length; a fact further back than the window times the number of such
layers is out of reach. As Mistral: position i sees j with i - j < W. A layer may have queries alone, and read the window of
an earlier one with the same settings (own_kv, as in Gemma 3n).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from slipstream.core.lender import Lender, Lent
from slipstream.core.mixer import Mode
from slipstream.core.state import Slot, State
from slipstream.layers.grouped_qkv import GroupedQKV
from slipstream.layers.linear import Linear
from slipstream.layers.softmax_heads import SoftmaxConfig, joined
from slipstream.layers.sparse_lines import recent_slots
from slipstream.ops.attention import attention_flops, window_attention
from slipstream.ops.attention import reference as softmax_reference
from slipstream.ops.softmax import Softmax
from slipstream.ops.valid import last_tokens, zero_padding


class SlidingWindow(Lender, name="sliding_window", family="attention"):
    paper = (
        "Beltagy et al. 2020, arXiv:2004.05150, sec. 3.1; as in Mistral 7B, Jiang et al. 2023, arXiv:2310.06825, sec. 2"
    )
    use_when = "what matters is nearby, must be exact, and memory must not grow with the text"
    writes, erases = "k and v, beside the last W", "nothing"
    decays, reads = "what leaves the window, all at once", "softmax(K q)^T V"
    symbols = {"W": "window", "Q": "q", "K": "k", "V": "v"}
    oracle = (
        "transformers MistralForCausalLM, tests/oracles/test_attention_oracles.py; its settings against Gemma 2 and gpt-oss, "
        "tests/oracles/test_attention_settings_oracles.py"
    )

    class Config(SoftmaxConfig):
        window: int = Field(256, ge=1)  # tokens seen, the current one included
        own_kv: bool = True  # False: reads the window of the layer before it that has the same settings (Gemma 3n)

    config: Config
    tiny = Config(d_model=16, n_heads=4, n_kv_heads=2, window=5)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.qkv, self.window = GroupedQKV(config, config.own_kv, config.head_dim), config.window
        self.sinks = nn.Parameter(torch.zeros(self.qkv.n_heads)) if config.sinks else None
        self.o_proj = Linear(self.qkv.width, config.d_model, bias=config.o_bias)
        self.g_proj = Linear(config.d_model, self.qkv.width, bias=False) if config.gated else None

    def slots(self) -> dict[str, Slot]:
        return recent_slots(self.qkv, self.window - 1) if self.config.own_kv else self.qkv.slots()

    def share_prefill(
        self,
        x: Float[Tensor, "B T D"],
        state: State,
        lent: Lent | None = None,
        lengths: Int[Tensor, "B"] | None = None,
    ):
        """Lent are lines of keys and values: the window before these tokens, then these."""
        if lent is None:
            q, k, v, slots = self.qkv(x, state, lengths)
            lent = tuple(torch.cat([state[n], zero_padding(new, lengths)], 1) for n, new in (("k", k), ("v", v)))
            slots |= {n: last_tokens(line, self.window - 1, lengths) for n, line in zip("kv", lent)}
        else:
            q, slots = self.qkv.queries(x, state, lengths)
        o = window_attention(q, *lent, state.length, self.window, self._softmax())
        new = state.advance(x.shape[1] if lengths is None else lengths, **slots)
        return self.o_proj(joined(o, x, self.g_proj)), new, lent

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self.qkv.reference(x)
        o = softmax_reference(q, k, v, window=self.window, softmax=self._softmax())
        return self.o_proj(joined(o, x, self.g_proj))

    def _softmax(self) -> Softmax:
        return Softmax(self.config.qk_scale, self.config.softcap, self.sinks)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return attention_flops(T, B, self.qkv.n_heads, self.qkv.head_dim, mode, self.window)
