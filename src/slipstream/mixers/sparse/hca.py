r"""Heavily compressed attention (DeepSeek-V4's HCA): a window as it is, and all that was before in one key for m tokens.

    o_t = sum_{s in W(t) + {i : (i + 1) m <= t + 1}} e^{q_t . c_s / sqrt(K)} c_s / (e^{sink} + sum_s e^{q_t . c_s / sqrt(K)})

    c_s = rope(norm(W_kv x_s)) in the window W(t) = {t - w < s <= t}
    c_i = rope(norm(sum_j softmax_j(W_z x_j + e_j) * W_u x_j)) over tokens j = i m ... i m + m - 1, channel by channel

One head of keys, which are the values too, serves all heads of queries; their outputs are turned back by their own position.
DeepSeek's grouped output projection is one product here, and its YaRN is not here.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.compressed_kv import CompressedConfig, Compressor, SharedKVHeads
from slipstream.ops.compressed_attention import window_and_summaries, window_and_summaries_flops
from slipstream.ops.valid import last_tokens, zero_padding


class HCA(Mixer, name="hca", family="sparse"):
    paper = "DeepSeek-AI 2026 (DeepSeek-V4), sec. 2.3.2; as in transformers"
    use_when = "very long texts at a small part of attention's memory: near words exact, far ones in outline"
    writes, erases = "c_s to the window; c_i, every m tokens", "nothing"
    decays, reads = "what leaves the window, all at once, into its outline", "softmax([C_W; C_m] q)^T [C_W; C_m]"
    train_order, decode_order = "T^2", "T"
    symbols = {"m'": "rate", "n_win": "window", "Z": "W_z x", "C": "W_u x", "B": "position_bias"}
    oracle = "transformers DeepseekV4Attention, tests/oracles/test_chosen_attention_oracles.py"
    no_weight_decay = ("sinks",)

    class Config(CompressedConfig):
        rate: int = Field(32, ge=1)  # tokens that become one key (DeepSeek-V4: 128)

    config: Config
    tiny = Config(d_model=16, n_heads=2, q_rank=7, rope_head_dim=4, window=5, rate=3)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.heads = SharedKVHeads(config)
        of_heads = self.heads.turned, self.heads.base
        self.compressor = Compressor(config.d_model, self.heads.head_dim, config.rate, False, *of_heads)

    def slots(self) -> dict[str, Slot]:
        entries = Slot((0, 1, self.heads.head_dim), dtype=None, grows=True, every=self.config.rate)
        near = Slot((self.config.window - 1, 1, self.heads.head_dim), dtype=None)
        return {"near": near, "entries": entries, **self.compressor.slots()}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        return self.step(x, self.reserve(state, x.shape[1]), lengths)

    def step(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        """As prefill, in a cache that has room already: init_state(B, max_len), or reserve."""
        past, c = state.length, self.config
        positions = past[:, None] + torch.arange(x.shape[1], device=x.device)
        q = self.heads.queries(self.heads.low_rank(x), positions)
        line = torch.cat([state["near"], zero_padding(self.heads.keys(x, positions), lengths)], 1)
        slots = self.compressor(x, state.slots, past, lengths) | {"near": last_tokens(line, c.window - 1, lengths)}
        o = window_and_summaries(q, line, slots["entries"], past, c.window, c.rate, None, self.heads.softmax)
        return self.heads.output(o, positions), state.advance(x.shape[1] if lengths is None else lengths, **slots)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        positions = torch.arange(x.shape[1]).expand(len(x), -1)
        q, keys = self.heads.queries(self.heads.low_rank(x), positions), self.heads.keys(x, positions)
        met = [torch.arange((t + 1) // self.config.rate).expand(len(x), -1) for t in range(x.shape[1])]
        o = self.heads.reference(q, keys, self.compressor.reference(x), self.config.window, met)
        return self.heads.output(o, positions)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        c = self.config
        return window_and_summaries_flops(T, B, self.heads.n_heads, self.heads.head_dim, c.window, c.rate, mode)
