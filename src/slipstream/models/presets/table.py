"""The presets as data. Patterns hold ratios and kinds of layers; sizes are those of the model named, from its own config.json.

Scaled patterns keep what makes a family: the order of layers, positions, gates, how experts are chosen. What counts heads or
widths follows from d_model; mixtures of more experts are scaled down to 16, of which a token uses 2, 4 or 8, shared ones
included, so that every width divides. Published patterns are those of the model named, as its config.json has them.
Weights' scales (Granite's multipliers, Gemma's embedding factor) are a checkpoint's, and are read with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """A public model: settings of ModelConfig that have its sizes; its parameters, and those of a token, as its makers say."""

    model: str
    settings: dict[str, Any]
    total: float
    active: float | None = None  # None: all of them


@dataclass(frozen=True)
class Preset:
    """title: what it is, in a line. paper: where it is from."""

    pattern: str
    title: str
    paper: str
    published: Published | None = None


def _sizes(
    pattern: str, n_layers: int, d_model: int, vocab_size: int, tied: bool = False, **more: Any
) -> dict[str, Any]:
    sizes = {"pattern": pattern, "n_layers": n_layers, "d_model": d_model, "vocab_size": vocab_size}
    return {**sizes, "tie_embeddings": tied, **more}


def _jamba(mamba: str, attention: str, moe: str) -> str:
    sparse = f"{mamba}/{moe}"
    return f"{mamba}, {sparse}, {mamba}, {sparse}, {attention}, {sparse}, {mamba}, {sparse}"


def _nemotron_h(mamba: str, mlp: str, attention: str) -> str:
    """Layers of one mixer each: M - M - M - M * - ... as its config.json writes them."""
    order = "M-M-M-M*-" + "M-M-M-M-M*-" * 3 + "M-M-M-M-M-"
    kinds = {"M": mamba, "-": mlp, "*": attention}
    return ", ".join(f"{kinds[letter]}/none" for letter in order)


def _zamba2() -> str:
    """54 layers of Mamba-2, before nine of which one of two transformers speaks, in turns."""
    mamba, alone = "mamba2(n_heads=80, d_state=64)", [6, 5, 5, 5, 5, 5, 5, 4, 3]
    before = (f"{n}*{mamba}/none, {_OF_ZAMBA2.format(i % 2)}/{mamba}" for i, n in enumerate(alone))
    return ", ".join([*before, f"2*{mamba}/none"])


_OF_ZAMBA2 = (
    "zamba2_transformer(n_heads=32, rope_base=none, reads_embedding=true, d_ff=10240, adapter_rank=128, tied={}, "
    "to_next=true)"
)
_OF_RWKV7 = "rwkv7(decay_rank=96, rate_rank=96, value_rank=64, gate_rank=320)/rwkv7_channel_mix"
_OF_MIXTRAL = "attention(n_heads=32, n_kv_heads=8, rope_base=1e6)/moe(n_experts=8, top_k=2, d_expert=14336)"
_OF_DEEPSEEK = "mla(n_heads=128, kv_rank=512, q_rank=1536, nope_head_dim=128, rope_head_dim=64, v_head_dim=128)"
_DEEPSEEK_MOE = (
    "moe(n_experts=256, top_k=8, d_expert=2048, n_shared_experts=1, gate=sigmoid, scale=2.5, selection_bias=true, "
    "n_groups=8, top_groups=4)"
)
_GPT_OSS = "n_heads=64, n_kv_heads=8, head_dim=64, rope_base=150000, sinks=true, qkv_bias=true, o_bias=true"
_GPT_OSS_MOE = "moe(n_experts=128, top_k=4, d_expert=2880, bias=true, clamp=7)"
_GEMMA3 = "n_heads=32, n_kv_heads=16, head_dim=128, qk_norm=plus_one"
_GEGLU = "swiglu(activation=gelu_tanh)"
_MINIMAX_MOE = "moe(n_experts=32, top_k=2, d_expert=9216)"
_QWEN_MOE = "moe(n_experts=512, top_k=10, d_expert=512, n_shared_experts=1, shared_gate=true)"
_QWEN_ATTENTION = (
    "attention(n_heads=16, n_kv_heads=2, head_dim=256, rope_base=1e7, rope_fraction=0.25, qk_norm=plus_one, gated=true)"
)
_KIMI = "kda(n_heads=32, head_dim=128)"
_KIMI_MLA = "mla(n_heads=32, kv_rank=512, nope_head_dim=128, rope_head_dim=64, v_head_dim=128, rope_base=none)"
_KIMI_MOE = (
    "moe(n_experts=256, top_k=8, d_expert=1024, n_shared_experts=1, gate=sigmoid, scale=2.446, selection_bias=true)"
)
_LFM2 = "attention(n_heads=32, n_kv_heads=8, rope_base=1e6, qk_norm=true)"
_GRANITE_MOE = "moe(n_experts=72, top_k=10, d_expert=768, n_shared_experts=2)"
_GRANITE_ATTENTION = "attention(n_heads=32, n_kv_heads=8, rope_base=none)"

PRESETS: dict[str, Preset] = {
    "llama": Preset(
        "attention",
        "softmax attention and SwiGLU in every layer",
        "Touvron et al. 2023, arXiv:2307.09288",
        Published("Llama 2 7B", _sizes("attention(n_heads=32)", 32, 4096, 32000, d_ff=11008), 6.74e9),
    ),
    "mixtral": Preset(
        "attention/moe(n_experts=8, top_k=2)",
        "attention, and two of eight experts for every token",
        "Jiang et al. 2024, arXiv:2401.04088",
        Published("Mixtral 8x7B", _sizes(_OF_MIXTRAL, 32, 4096, 32000), 46.7e9, 12.9e9),
    ),
    "olmoe": Preset(
        "attention(qk_norm=whole)/moe(n_experts=16, top_k=4, normalised=false)",
        "attention, and eight of 64 small experts for every token",
        "Muennighoff et al. 2024, arXiv:2409.02060",
        Published(
            "OLMoE 1B-7B",
            _sizes(
                "attention(n_heads=16, qk_norm=whole)/moe(n_experts=64, top_k=8, d_expert=1024, normalised=false)",
                16,
                2048,
                50304,
            ),
            6.92e9,
            1.28e9,
        ),
    ),
    "deepseek_v3": Preset(
        "mla/moe(n_experts=16, top_k=3, n_shared_experts=1, gate=sigmoid, scale=2.5, selection_bias=true)",
        "latent attention, and a shared and eight of 256 experts for every token",
        "DeepSeek-AI 2024, arXiv:2412.19437",
        Published(
            "DeepSeek-V3",
            _sizes(f"3*{_OF_DEEPSEEK}/swiglu(d_ff=18432), 58*{_OF_DEEPSEEK}/{_DEEPSEEK_MOE}", 61, 7168, 129280),
            671e9,
            37e9,
        ),
    ),
    "gpt_oss": Preset(
        "sliding_window(window=128, sinks=true)/moe(n_experts=16, top_k=4), attention(sinks=true)/moe(n_experts=16, top_k=4)",
        "windows and full attention in turns, with sinks; four of 128 experts for every token",
        "OpenAI 2025, arXiv:2508.10925",
        Published(
            "gpt-oss-120b",
            _sizes(
                f"sliding_window(window=128, {_GPT_OSS})/{_GPT_OSS_MOE}, attention({_GPT_OSS})/{_GPT_OSS_MOE}",
                36,
                2880,
                201088,
            ),
            116.8e9,
            5.1e9,
        ),
    ),
    "gemma3": Preset(
        f"5*sliding_window(window=1024, qk_norm=plus_one)/{_GEGLU}, attention(rope_base=1e6, qk_norm=plus_one)/{_GEGLU}",
        "five windows to one layer of full attention",
        "Gemma Team 2025, arXiv:2503.19786",
        Published(
            "Gemma 3 27B",
            _sizes(
                f"5*sliding_window(window=1024, {_GEMMA3})/{_GEGLU}, attention(rope_base=1e6, {_GEMMA3})/{_GEGLU}",
                62,
                5376,
                262208,
                tied=True,
                d_ff=21504,
                norm="rms_plus_one",
                norm_place="around",
            ),
            27.0e9,
        ),
    ),
    "jamba": Preset(
        _jamba("mamba(norms=true)", "attention(rope_base=none)", "moe(n_experts=16, top_k=2, normalised=false)"),
        "seven Mamba layers to one of attention without positions; experts in every second layer",
        "Lieber et al. 2024, arXiv:2403.19887",
        Published(
            "Jamba v0.1",
            _sizes(
                _jamba(
                    "mamba(norms=true, dt_rank=256)",
                    "attention(n_heads=32, n_kv_heads=8, rope_base=none)",
                    "moe(n_experts=16, top_k=2, d_expert=14336, normalised=false)",
                ),
                32,
                4096,
                65536,
                d_ff=14336,
            ),
            52e9,
            12e9,
        ),
    ),
    "samba": Preset(
        "mamba, sliding_window(window=2048)",
        "Mamba and a window in turns, a feed-forward behind each: memory does not grow",
        "Ren et al. 2024, arXiv:2406.07522",
    ),
    "minimax_01": Preset(
        "7*lightning_attention/moe(n_experts=16, top_k=2), attention(rope_fraction=0.5)/moe(n_experts=16, top_k=2)",
        "seven layers of linear attention to one of softmax; two of 32 experts for every token",
        "MiniMax 2025, arXiv:2501.08313",
        Published(
            "MiniMax-Text-01",
            _sizes(
                f"7*lightning_attention(n_heads=64, head_dim=128)/{_MINIMAX_MOE}, "
                f"attention(n_heads=64, n_kv_heads=8, head_dim=128, rope_base=1e7, rope_fraction=0.5)/{_MINIMAX_MOE}",
                80,
                6144,
                200064,
            ),
            456e9,
            45.9e9,
        ),
    ),
    "griffin": Preset(
        f"2*rg_lru/{_GEGLU}, sliding_window(window=2048, n_kv_heads=1, rope_fraction=0.5)/{_GEGLU}",
        "two gated linear recurrences to one window with a single key head",
        "De et al. 2024, arXiv:2402.19427; RecurrentGemma: Botev et al. 2024, arXiv:2404.07839",
        Published(
            "RecurrentGemma 2B",
            _sizes(
                f"2*rg_lru(n_heads=10)/{_GEGLU}, "
                f"sliding_window(window=2048, n_heads=10, n_kv_heads=1, rope_fraction=0.5)/{_GEGLU}",
                26,
                2560,
                256000,
                tied=True,
                d_ff=7680,
            ),
            2.68e9,
        ),
    ),
    "nemotron_h": Preset(
        "3*mamba2, attention(rope_base=none)/mlp(activation=relu2), 4*mamba2",
        "Mamba-2 with an attention layer in thirteen, and plain feed-forwards",
        "NVIDIA 2025, arXiv:2504.03624",
        Published(
            "Nemotron-H 8B",
            _sizes(
                _nemotron_h(
                    "mamba2(n_heads=128, n_groups=8)",
                    "mlp(activation=relu2, d_ff=21504)",
                    "attention(n_heads=32, n_kv_heads=8, head_dim=128, rope_base=none)",
                ),
                52,
                4096,
                131072,
            ),
            8.1e9,
        ),
    ),
    "zamba2": Preset(
        "5*mamba2/none, zamba2_transformer(reads_embedding=true, adapter_rank=16, tied=0, to_next=true)/mamba2",
        "Mamba-2, before every sixth layer one transformer, the same for all, with adapters of each use",
        "Glorioso et al. (Zyphra) 2024, arXiv:2411.15242",
        Published("Zamba2 2.7B", _sizes(_zamba2(), 54, 2560, 32000, tied=True, norm_eps=1e-5), 2.66e9),
    ),
    "bamba": Preset(
        "9*mamba2, attention(rope_fraction=0.5)",
        "nine Mamba-2 layers to one of attention, a feed-forward behind each",
        "IBM, Princeton, CMU, UIUC 2024, Bamba, huggingface.co/blog/bamba",
        Published(
            "Bamba 9B",
            _sizes(
                "9*mamba2(n_heads=128), attention(n_heads=32, n_kv_heads=8, rope_fraction=0.5), 8*mamba2(n_heads=128), "
                "attention(n_heads=32, n_kv_heads=8, rope_fraction=0.5), 8*mamba2(n_heads=128), "
                "attention(n_heads=32, n_kv_heads=8, rope_fraction=0.5), 4*mamba2(n_heads=128)",
                32,
                4096,
                128256,
                d_ff=14336,
            ),
            9.78e9,
        ),
    ),
    "granite_hybrid": Preset(
        "5*mamba2/moe(n_experts=16, top_k=6, n_shared_experts=2), "
        "attention(rope_base=none)/moe(n_experts=16, top_k=6, n_shared_experts=2), "
        "4*mamba2/moe(n_experts=16, top_k=6, n_shared_experts=2)",
        "nine Mamba-2 layers to one of attention without positions; ten of 72 experts for every token",
        "IBM 2025, Granite 4.0, ibm.com/granite",
        Published(
            "Granite 4.0 H Small",
            _sizes(
                f"5*mamba2(n_heads=128)/{_GRANITE_MOE}, {_GRANITE_ATTENTION}/{_GRANITE_MOE}, "
                f"4*mamba2(n_heads=128)/{_GRANITE_MOE}",
                40,
                4096,
                100352,
                tied=True,
            ),
            32.2e9,
            9e9,
        ),
    ),
    "qwen3_next": Preset(
        "3*gated_deltanet/moe(n_experts=16, top_k=3, n_shared_experts=1, shared_gate=true), "
        "attention(rope_fraction=0.5, qk_norm=plus_one, gated=true)"
        "/moe(n_experts=16, top_k=3, n_shared_experts=1, shared_gate=true)",
        "three layers of gated delta rule to one of gated attention; ten of 512 experts for every token",
        "Qwen Team 2025, Qwen3-Next, qwen.ai/blog",
        Published(
            "Qwen3-Next 80B-A3B",
            _sizes(
                f"3*gated_deltanet(n_heads=16, n_v_heads=32, head_dim=128)/{_QWEN_MOE}, {_QWEN_ATTENTION}/{_QWEN_MOE}",
                48,
                2048,
                151936,
            ),
            80e9,
            3.9e9,
        ),
    ),
    "kimi_linear": Preset(
        "3*kda/moe(n_experts=16, top_k=3, n_shared_experts=1, gate=sigmoid, scale=2.446, selection_bias=true), "
        "mla(rope_base=none)/moe(n_experts=16, top_k=3, n_shared_experts=1, gate=sigmoid, scale=2.446, selection_bias=true)",
        "three layers of channel-wise gated delta rule to one of latent attention without positions",
        "Kimi Team 2025, arXiv:2510.26692",
        Published(
            "Kimi Linear 48B-A3B",
            _sizes(
                f"{_KIMI}/swiglu(d_ff=9216), 2*{_KIMI}/{_KIMI_MOE}, {_KIMI_MLA}/{_KIMI_MOE}, "
                + f"3*{_KIMI}/{_KIMI_MOE}, {_KIMI_MLA}/{_KIMI_MOE}, " * 5
                + f"2*{_KIMI}/{_KIMI_MOE}, {_KIMI_MLA}/{_KIMI_MOE}",
                27,
                2304,
                163840,
            ),
            48e9,
            3e9,
        ),
    ),
    "lfm2": Preset(
        "2*lfm2_conv, attention(qk_norm=true), 2*lfm2_conv",
        "gated short convolutions, and attention in about every third layer",
        "Liquid AI 2025, arXiv:2511.23404",
        Published(
            "LFM2 1.2B",
            _sizes(
                f"2*lfm2_conv, {_LFM2}, 2*lfm2_conv, {_LFM2}, 2*lfm2_conv, {_LFM2}, lfm2_conv, {_LFM2}, lfm2_conv, {_LFM2}, "
                f"lfm2_conv, {_LFM2}, lfm2_conv",
                16,
                2048,
                65536,
                tied=True,
                d_ff=8192,
            ),
            1.17e9,
        ),
    ),
    "yoco": Preset(
        "2*sliding_window(window=1024), attention, attention(own_kv=false)",
        "windows below, and above them attention that reads one cache of keys and values",
        "Sun et al. 2024, arXiv:2405.05254",
    ),
    "mamba": Preset(
        "mamba/none",
        "Mamba alone, without feed-forwards",
        "Gu & Dao 2023, arXiv:2312.00752",
        Published("Mamba 2.8B", _sizes("mamba/none", 64, 2560, 50280, tied=True), 2.77e9),
    ),
    "mamba2": Preset(
        "mamba2/none",
        "Mamba-2 alone, without feed-forwards",
        "Dao & Gu 2024, arXiv:2405.21060",
        Published("Mamba-2 2.7B", _sizes("mamba2/none", 64, 2560, 50288, tied=True), 2.7e9),
    ),
    "falcon_mamba": Preset(
        "mamba(norms=true)/none",
        "Mamba alone, with norms on what it chooses by",
        "Zuo et al. (TII) 2024, arXiv:2410.05355",
        Published("Falcon Mamba 7B", _sizes("mamba(norms=true)/none", 64, 4096, 65024), 7.27e9),
    ),
    "rwkv7": Preset(
        "rwkv7/rwkv7_channel_mix",
        "RWKV-7 with its channel mix; layers after the first mix in its values (value_residual=true)",
        "Peng et al. 2025, arXiv:2503.14456",
        Published(
            "RWKV-7 World 2.9B",
            _sizes(_OF_RWKV7, 32, 2560, 65536, value_residual=True, norm="layer", embedding_norm=True),
            2.9477e9,
        ),
    ),
    "xlstm": Preset(
        "7*mlstm, slstm",
        "seven matrix-memory LSTMs to one with gates that see the last output",
        "Beck et al. 2024, arXiv:2405.04517; 7B without the latter: arXiv:2503.13427",
        Published(
            "xLSTM 7B", _sizes("mlstm(n_heads=8, expand_k=0.5, conv_size=0)", 32, 4096, 50304, d_ff=10944), 6.87e9
        ),
    ),
}
