"""Zamba2 (Glorioso et al. 2024, arXiv:2411.15242): Mamba-2, and before some layers one of a few transformers that they share.

Layer u of those with a transformer has that of layer u modulo num_mem_blocks; adapters are stored with the transformer, by u.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from slipstream.core.errors import InputError
from slipstream.interop.hf.decoder import (
    ACTIVATIONS,
    THEIR_ACTIVATIONS,
    model_config,
    part,
    pattern,
    rope,
    sizes,
    stem,
    their_heads,
    their_rope,
    their_sizes,
    values,
)
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields, one_of_each
from slipstream.interop.hf.state_space import RUN_AND_TRAINED, ssd, their_ssd
from slipstream.interop.hf.weights import Rule, in_blocks, rename, renames
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel
from slipstream.models.pattern import Part, layers
from slipstream.models.sharing import owners

MAMBA, HYBRID = "linear_attention", "hybrid"
KINDS = {MAMBA: MAMBA, "mamba": MAMBA, HYBRID: HYBRID}
NAMES = {
    "expand": "mamba_expand",
    "n_heads": "n_mamba_heads",
    "head_dim": "mamba_headdim",
    "n_groups": "mamba_ngroups",
    "d_state": "mamba_d_state",
    "conv_size": "mamba_d_conv",
    "bias": "add_bias_linear",
    "conv_bias": "use_conv_bias",
}
SHARED = "shared_transformer"
MAMBA_LAYER = [rename("input_layernorm", "norms.0"), rename("mamba", "mixers.0")]
HYBRID_LAYER = [
    rename("linear", "mixers.0.linear"),
    rename("mamba_decoder.input_layernorm", "norms.1"),
    rename("mamba_decoder.mamba", "mixers.1"),
]
TRANSFORMER = [
    rename(f"{SHARED}.input_layernorm", "norms.0"),
    rename(f"{SHARED}.pre_ff_layernorm", "mixers.0.norm"),
    *renames(f"{SHARED}.self_attn", "mixers.0.qkv", "q_proj k_proj v_proj"),
    rename(f"{SHARED}.self_attn.o_proj", "mixers.0.o_proj"),
    *renames(f"{SHARED}.feed_forward", "mixers.0", "gate_up_proj down_proj"),
]
ADAPTERS = {f"self_attn.linear_{n}_adapter_list.{{}}": f"adapters.{n}" for n in "qkv"}
ADAPTERS |= {"feed_forward.gate_up_proj_adapter_list.{}": "gate_up_adapter"}
LAYERS = "m" + "mmmmmh" * 7 + "mmmmh" + "mmmh" + "mm"  # of Zamba2 2.7B, which transformers has as default
FOLLOWING = ("attention_head_dim", "attention_hidden_size", "kv_channels", "num_query_groups", "hybrid_layer_ids")


class Zamba2(Family):
    model_types = ("zamba2",)
    architecture = "Zamba2ForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        about = sizes(hf, tied=True, eps=1e-5)
        hf.only("tie_word_embeddings", True)  # the word ties all that is shared: without it, no transformer is
        by_default = [HYBRID if letter == "h" else MAMBA for letter in LAYERS]
        kinds = hf.words("layers_block_type", KINDS, about["n_layers"], by_default)
        hybrid, mamba = self._transformer(hf, about["norm_eps"]), self._mamba(hf)
        count = hf.whole("num_mem_blocks", 1)
        hf.only("use_shared_mlp_adapter", True)
        hf.ignore("use_mem_eff_path", "chunk_size", "use_long_context", *FOLLOWING, *RUN_AND_TRAINED)

        def blocks() -> Iterator[tuple[Part, ...]]:
            use = 0
            for kind in kinds:
                yield (replace(hybrid, tied=use % count), mamba) if kind == HYBRID else (mamba,)
                use += kind == HYBRID

        return model_config(pattern(blocks()), about)

    @staticmethod
    def _transformer(hf: Fields, norm_eps: float) -> Part:
        d_model, n_heads = hf.whole("hidden_size"), hf.whole("num_attention_heads", 32)
        if d_model % n_heads:
            raise InputError(f"{hf.owner}: hidden_size {d_model} does not divide into num_attention_heads {n_heads}")
        hf.ignore("rope_parameters", "rope_scaling", "rope_theta")
        n_kv_heads, adapted = hf.whole("num_key_value_heads", n_heads), hf.flag("use_shared_attention_adapter", False)
        if adapted and n_kv_heads != n_heads:
            raise InputError(
                f"{hf.owner}: adapters of k and v are as wide as those of q, so num_key_value_heads must be {n_heads}"
            )
        made = part(
            "zamba2_transformer",
            rope(hf) if hf.flag("use_mem_rope", False) else {"rope_base": "none"},
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            reads_embedding=True,
            d_ff=hf.whole("intermediate_size", 4 * d_model),
            activation=ACTIVATIONS[hf.word("hidden_act", ACTIVATIONS, "gelu")],
            bias=hf.flag("add_bias_linear", False),
            adapter_rank=hf.whole("adapter_rank", 128),
            attention_adapters=adapted,
            norm_eps=norm_eps,
        )
        return replace(made, to_next=True)

    @staticmethod
    def _mamba(hf: Fields) -> Part:
        """Its convolution has a bias, whatever settings say, and its step size a lower bound. Its norm's epsilon is fixed."""
        layer = ssd(hf, NAMES, n_heads=8, n_groups=1, d_state=64, conv_size=4) | {"conv_bias": True}
        return part("mamba2", layer | {"dt_min": hf.number("time_step_min", 0.001) or None, "dt_max": None})

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        hybrids, mambas = self._uses(model), [block.mixers[-1] for block in model.stack.blocks]
        if not hybrids:
            raise InputError("this family has zamba2_transformer before some layers; there is none")
        shared: list[Any] = [model.stack.blocks[i].mixers[0] for i in hybrids]

        def same(name: str) -> Any:
            return one_of_each((values(mixer)[name] for mixer in shared), name)

        heads, mamba = their_heads(shared), their_ssd(mambas, NAMES)
        mamba.pop("time_step_limit", None)
        turned = same("rope_base") is not None
        return {
            **their_sizes(model),
            **mamba,
            "time_step_min": one_of_each((values(m)["dt_min"] for m in mambas), "dt_min") or 0.0,
            "num_attention_heads": heads["num_attention_heads"],
            "num_key_value_heads": heads["num_key_value_heads"],
            "intermediate_size": one_of_each((m.down_proj.in_features for m in shared), "d_ff"),
            "hidden_act": THEIR_ACTIVATIONS[same("activation")],
            "adapter_rank": same("adapter_rank"),
            "use_shared_attention_adapter": same("attention_adapters"),
            "use_mem_rope": turned,
            **({"rope_parameters": their_rope(shared)} if turned else {}),
            "layers_block_type": [HYBRID if i in hybrids else MAMBA for i in range(model.config.n_layers)],
            "num_mem_blocks": len(set(hybrids.values())),
        }

    @staticmethod
    def _uses(model: LanguageModel) -> dict[int, int]:
        """Blocks with a transformer, and the block that owns its weights."""
        found: dict[int, int] = {}
        for i, block in enumerate(model.stack.blocks):
            names = [mixer.name for mixer in block.mixers]
            if names == ["zamba2_transformer", "mamba2"]:
                found[i] = int(model.stack.tied.get(f"{i}.0", f"{i}.0").partition(".")[0])
            elif names != ["mamba2"]:
                raise InputError(
                    f"blocks of this family are mamba2 or zamba2_transformer/mamba2, not {'/'.join(names)}"
                )
        return found

    def rules(self, model: LanguageModel) -> list[Rule]:
        hybrids = self._uses(model)
        others = [i for i in range(model.config.n_layers) if i not in hybrids]
        adapters = [
            rename(theirs.format(use), ours).inside(f"model.layers.{owner}.{SHARED}", f"stack.blocks.{i}.mixers.0")
            for use, (i, owner) in enumerate(hybrids.items())
            for theirs, ours in ADAPTERS.items()
        ]
        return [
            *stem(norm="final_layernorm"),
            *in_blocks(MAMBA_LAYER, others),
            *in_blocks(HYBRID_LAYER, hybrids),
            *in_blocks(TRANSFORMER, set(hybrids.values())),
            *adapters,
        ]

    def surplus(self, name: str, config: ModelConfig) -> bool:
        """Weights of a transformer that files hold once more where it is used again: transformers ties them too."""
        again = {place.partition(".")[0] for place in owners(layers(config.pattern, config.n_layers))}
        words = name.split(".")
        return (words[3:4] == [SHARED] and words[2] in again) or super().surplus(name, config)
