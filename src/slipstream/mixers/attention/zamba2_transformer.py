r"""The shared transformer of Zamba2: attention, a norm and a gated feed-forward in a row, with adapters of each use.

    q, k, v = (W + A_2 A_1) x          o_t = sum_{s<=t} softmax_s(q_t . k_s / sqrt(D / H)) v_s
    a = rms_norm(W_o o) * weight       g, u = (W_gu + B_2 B_1) a        y = W_l W_d (gelu(g) * u)

One set of these weights serves several layers of a model (tied=0 in a pattern); A, B and W_l are of each layer. There is no
residual within. With reads_embedding, x is the stream beside the embedding of the same token, twice d_model wide, and the heads
twice as wide too; what it says goes to the Mamba-2 layer behind it and not into the stream (to_next=true):
"5*mamba2/none, zamba2_transformer(reads_embedding=true, tied=0, to_next=true)/mamba2". Weights are named as transformers' but
for self_attn, which is qkv here, and without the number of the use.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from slipstream.core.config import heads
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.activations import GATED, Activation
from slipstream.layers.gated_mlp import gated_width
from slipstream.layers.grouped_qkv import GroupedConfig, GroupedQKV
from slipstream.layers.linear import Linear
from slipstream.layers.norm import RMSNorm
from slipstream.ops.attention import attention, attention_flops, write_cache
from slipstream.ops.attention import reference as softmax_reference
from slipstream.ops.softmax import Softmax


class Zamba2Transformer(Mixer, name="zamba2_transformer", family="attention"):
    paper = (
        "Glorioso et al. 2024 (Zamba2), arXiv:2411.15242, fig. 2; Zamba: arXiv:2405.16712; as in transformers' Zamba2"
    )
    use_when = (
        "a recurrent model should find exact facts again, for the weights of one attention layer in the whole model"
    )
    writes, erases = "k and v, beside all others", "nothing"
    decays, reads = "nothing", "softmax(K q)^T V"
    train_order, decode_order = "T^2", "T"
    symbols = {"A": "adapters", "B": "gate_up_adapter", "W_gu": "gate_up_proj", "W_d": "down_proj", "W_l": "linear"}
    oracle = "transformers Zamba2ForCausalLM with copied weights, tests/interop/test_hf_zamba2.py"
    untied = ("adapters", "gate_up_adapter", "linear")

    class Config(GroupedConfig):
        reads_embedding: bool = False  # x is the stream beside the embedding of the token, 2 d_model wide
        d_ff: PositiveInt | None = None  # inner width of the feed-forward; default 8/3 d_model
        activation: Activation = "gelu"  # of its gate
        bias: bool = False  # biases in the feed-forward
        adapter_rank: NonNegativeInt = 0  # rank of each layer's own change to the shared W_gu; 0 for none
        attention_adapters: bool = False  # the same for q, k and v
        norm_eps: PositiveFloat = 1e-5  # added under the root of the norm

    config: Config
    tiny = Config(d_model=16, n_heads=4, n_kv_heads=2, d_ff=24, adapter_rank=3, attention_adapters=True)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        D, F = config.d_model, config.d_ff or gated_width(config.d_model)
        width, n_heads, rank = D * (1 + config.reads_embedding), heads(D, config.n_heads), config.adapter_rank
        self.softmax = Softmax((D / n_heads) ** -0.5)
        wide = config.model_copy(update={"d_model": width, "n_heads": n_heads})
        self.qkv = GroupedQKV(wide, head_dim=width // n_heads)
        self.o_proj = Linear(self.qkv.width, D, bias=False)
        self.norm = RMSNorm(D, config.norm_eps)
        self.gate_up_proj = Linear(D, 2 * F, bias=config.bias)
        self.down_proj = Linear(F, D, bias=config.bias)
        self.linear = Linear(D, D, bias=False)
        kv = self.qkv.n_kv_heads * self.qkv.head_dim
        outputs = {"q": self.qkv.width, "k": kv, "v": kv} if rank and config.attention_adapters else {}
        self.adapters = nn.ModuleDict({n: _low_rank(width, rank, out) for n, out in outputs.items()})
        self.gate_up_adapter = _low_rank(D, rank, 2 * F) if rank else None
        self.gated = GATED[config.activation]

    def slots(self) -> dict[str, Slot]:
        cache = Slot((0, self.qkv.n_kv_heads, self.qkv.head_dim), dtype=None, grows=True)
        return {"k": cache, "v": cache, **self.qkv.slots()}

    def prefill(self, x: Float[Tensor, "B T I"], state: State, lengths: Int[Tensor, "B"] | None = None):
        return self._read(x, self.reserve(state, x.shape[1]), lengths)

    def step(self, x: Float[Tensor, "B 1 I"], state: State):
        """In a cache that has room already."""
        return self._read(x, state, None)

    def _read(self, x: Tensor, state: State, lengths: Tensor | None) -> tuple[Tensor, State]:
        q, k, v, convs = self.qkv(x, state, lengths, self.adapters)
        k, v = (write_cache(state[n], new, state.length, lengths) for n, new in (("k", k), ("v", v)))
        o = attention(q, k, v, state.length, lengths=lengths, softmax=self.softmax)
        return self._fed(o), state.advance(x.shape[1] if lengths is None else lengths, k=k, v=v, **convs)

    def _fed(self, o: Float[Tensor, "B T H K"]) -> Float[Tensor, "B T D"]:
        a = self.norm(self.o_proj(o.flatten(2)))
        both = self.gate_up_proj(a)
        if self.gate_up_adapter is not None:
            both = both + self.gate_up_adapter(a)
        gate, up = both.chunk(2, -1)
        return self.linear(self.down_proj(self.gated(up, gate)))

    def reference(self, x: Float[Tensor, "B T I"]) -> Float[Tensor, "B T D"]:
        return self._fed(softmax_reference(*self.qkv.reference(x, self.adapters), softmax=self.softmax))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        return attention_flops(T, B, self.qkv.n_heads, self.qkv.head_dim, mode)


def _low_rank(inputs: int, rank: int, outputs: int) -> nn.Sequential:
    """What one use adds to a shared projection (Hu et al. 2021, arXiv:2106.09685); nothing at the start."""
    down, up = Linear(inputs, rank, bias=False), Linear(rank, outputs, bias=False)
    nn.init.zeros_(up.weight)
    return nn.Sequential(down, up)
