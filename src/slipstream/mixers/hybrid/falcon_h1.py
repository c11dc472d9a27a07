r"""Falcon-H1: softmax attention and Mamba-2 on the same input, side by side, their outputs added.

    y = a_out W_o softmax(q k^T / sqrt(K)) v + s_out Mamba2(s_in x)        q = a_in W_q x, k = a_in a_key W_k x, v = a_in W_v x
    in Mamba-2: z, x, B, C, dt each times a number of its own before the convolution

The multipliers are numbers of the settings, chosen for the model as a whole (maximal update parametrisation); they change how
fast each matrix learns, and can be multiplied into it afterwards. Memory is that of both: a cache that grows, and a state that
does not. The mixers are in layers of their own under the names of transformers' FalconH1 but for self_attn, which is qkv here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.grouped_qkv import GroupedConfig, GroupedQKV
from slipstream.layers.linear import Linear
from slipstream.layers.sparse_lines import read_all
from slipstream.layers.ssd_block import (
    NO_WEIGHT_DECAY,
    GateNorm,
    SSDBlock,
    SSDConfig,
    projected,
    ssd,
    ssd_flops,
    ssd_one,
    ssd_reference,
    ssd_slots,
)
from slipstream.ops.attention import attention, attention_flops
from slipstream.ops.attention import reference as softmax_reference

SSM_FIELDS = "d_inner", "n_groups", "d_state", "norm", "norm_eps"  # the settings named ssm_ and this


class FalconH1(Mixer, name="falcon_h1", family="hybrid"):
    paper = "Zuo et al. (TII) 2025, Falcon-H1, arXiv:2507.22448; as in transformers' FalconH1"
    use_when = (
        "every layer should find exact facts and keep a running summary, and a cache in every layer is affordable"
    )
    writes, erases = "k and v, beside all others; B (dt x)^T", "nothing"
    decays, reads = "of S a number a head, from x", "softmax(K q)^T V + S^T C"
    train_order, decode_order = "T^2", "T"
    symbols = {"a_in, a_out, a_key": "attention_in, attention_out, key_scale", "s_in, s_out": "ssm_in, ssm_out"}
    oracle = (
        "transformers FalconH1DecoderLayer with copied weights, whole and cached, tests/oracles/test_hybrid_oracles.py"
    )
    no_weight_decay = NO_WEIGHT_DECAY

    class Config(GroupedConfig):
        head_dim: PositiveInt | None = None  # width of an attention head; default d_model / n_heads
        ssm_d_inner: PositiveInt | None = None  # inner width of Mamba-2; default 2 d_model, twice that of attention
        ssm_heads: int | None = None  # heads of Mamba-2; default its inner width / 64
        ssm_n_groups: int = 1  # groups of its heads that share B and C
        ssm_d_state: int = 128  # width of B and C
        ssm_conv_size: int = 4  # width of its short convolution
        ssm_norm: GateNorm = "none"  # of its output: none (the small models), before_gate or after_gate
        ssm_norm_eps: PositiveFloat = 1e-5  # added under that norm's root
        attention_in: float = 1.0  # factor on what attention reads
        attention_out: float = 1.0  # factor on what it says
        key_scale: float = 1.0  # factor on its keys
        ssm_in: float = 1.0  # factor on what Mamba-2 reads
        ssm_out: float = 1.0  # factor on what it says
        ssm_z: float = 1.0  # factor on its gate
        ssm_x: float = 1.0  # factor on its values
        ssm_B: float = 1.0  # factor on its keys
        ssm_C: float = 1.0  # factor on its queries
        ssm_dt: float = 1.0  # factor on its step sizes, before their bias
        chunk_size: int = 64  # tokens of one matrix product; no result depends on it

    config: Config
    tiny = Config(
        d_model=16, n_heads=4, n_kv_heads=2, key_scale=0.7, ssm_d_inner=24, ssm_heads=4, ssm_d_state=6, ssm_x=0.6
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.qkv = GroupedQKV(config, head_dim=config.head_dim)
        self.o_proj = Linear(self.qkv.width, config.d_model, bias=False)
        inner = {name: getattr(config, f"ssm_{name}") for name in SSM_FIELDS}
        inner |= {"n_heads": config.ssm_heads, "conv_size": config.ssm_conv_size, "chunk_size": config.chunk_size}
        self.ssm_config = SSDConfig(d_model=config.d_model, **inner)
        self.mamba = SSDBlock(self.ssm_config)

    def slots(self) -> dict[str, Slot]:
        cache = Slot((0, self.qkv.n_kv_heads, self.qkv.head_dim), dtype=None, grows=True)
        return {"k": cache, "v": cache, **self.qkv.slots(), **ssd_slots(self.mamba, self.ssm_config)}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        state = self.reserve(state, x.shape[1])
        return self._both(x, state, lengths, partial(ssd, lengths=lengths))

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        """In a cache that has room already."""
        return self._both(x, state, None, ssd_one)

    def _both(
        self, x: Tensor, state: State, lengths: Tensor | None, run: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    ):
        def read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q * self.config.key_scale, k, v, state.length)

        o, new = read_all(self.qkv, x * self.config.attention_in, state, lengths, read)
        y, kept = run(self.mamba, self.ssm_config, self._lines(x), state["S"], state["conv"])
        return self._added(o, y), new.advance(0, **kept)

    def _lines(self, x: Float[Tensor, "B T D"]) -> tuple[Tensor, ...]:
        """What enters Mamba-2's block, every part by its multiplier."""
        c, s = self.config, self.ssm_config
        z, xBC, dt, none = projected(self.mamba, s, x * c.ssm_in)
        width = s.n_groups * s.d_state
        parts = (s.inner, c.ssm_x), (width, c.ssm_B), (width, c.ssm_C)
        by_channel = torch.cat([x.new_full((n,), factor) for n, factor in parts])
        return z * c.ssm_z, xBC * by_channel, dt * c.ssm_dt, none

    def _added(self, o: Float[Tensor, "B T H K"], y: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.config.attention_out * self.o_proj(o.flatten(2)) + self.config.ssm_out * y

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self.qkv.reference(x * self.config.attention_in)
        o = softmax_reference(q, self.config.key_scale * k, v)
        return self._added(o, ssd_reference(self.mamba, self.ssm_config, self._lines(x)))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        both = attention_flops(T, B, self.qkv.n_heads, self.qkv.head_dim, mode)
        return both + ssd_flops(self.ssm_config, self.mamba.n_heads, T, B, mode)
