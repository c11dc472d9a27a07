"""xLSTM-7B (Beck et al. 2025, arXiv:2503.13427): mLSTM without convolution, and a SwiGLU after each."""

from __future__ import annotations

from typing import Any

import torch

from slipstream.core.errors import InputError
from slipstream.interop.hf.decoder import (
    attention_layers,
    model_config,
    part,
    pattern,
    second_mixers,
    sizes,
    stem,
    their_gated_mlp,
    their_sizes,
    values,
)
from slipstream.interop.hf.family import Family
from slipstream.interop.hf.fields import Fields, one_of_each
from slipstream.interop.hf.weights import Rule, fixed, in_blocks, rename
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel

EPS = "norm_eps"
NAMES = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "ogate_preact": "ogate_proj",
    "igate_preact": "igate_proj",
    "fgate_preact": "fgate_proj",
    "multihead_norm.weight": "norm.weight",
    "out_proj": "o_proj",
}
BLOCK = [
    rename("norm_mlstm", "norms.0"),
    rename("norm_ffn", "norms.1"),
    *(rename(f"mlstm_layer.{theirs}", f"mixers.0.{ours}") for theirs, ours in NAMES.items()),
    rename("ffn.proj_up_gate", "mixers.1.gate_proj"),
    rename("ffn.proj_up", "mixers.1.up_proj"),
    rename("ffn.proj_down", "mixers.1.down_proj"),
]
KERNELS = "chunkwise_kernel sequence_kernel step_kernel mode chunk_size return_last_states autocast_kernel_dtype"
RUN = f"{KERNELS} inference_state_dtype max_inference_chunksize norm_reduction_force_float32 embedding_dim num_blocks"


class XLSTM(Family):
    model_types = ("xlstm",)
    architecture = "xLSTMForCausalLM"

    def config(self, hf: Fields) -> ModelConfig:
        for name, other in (("hidden_size", "embedding_dim"), ("num_hidden_layers", "num_blocks")):
            if hf.has(other) and not hf.has(name):
                hf.table[name] = hf.table[other]
        about = sizes(hf, eps_name=EPS)
        about["tie_embeddings"] = False  # in transformers too, whatever is said
        hf.only("use_bias", False)
        hf.only("add_out_norm", True)
        hf.only("weight_mode", "single")
        hf.only("v_dim_factor", 1.0, 1)
        hf.only("eps", 1e-6)
        hf.ignore(*RUN.split())
        mlstm = part(
            "mlstm",
            n_heads=hf.whole("num_heads", 8),
            expand_k=float(hf.number("qk_dim_factor", 0.5)),
            conv_size=0,
            gate_soft_cap=float(hf.number("gate_soft_cap", 15.0)),
            norm_eps=about["norm_eps"],
        )
        mlp = part("swiglu", d_ff=self._width(hf, about["d_model"]))
        return model_config(pattern([(mlstm, mlp)]), about, logit_cap=float(hf.number("output_logit_soft_cap", 30.0)))

    @staticmethod
    def _width(hf: Fields, d_model: int) -> int:
        multiple = hf.whole("ffn_round_up_to_multiple_of", 64)
        return int((d_model * hf.number("ffn_proj_factor", 2.667, most=1e3) + multiple - 1) // multiple * multiple)

    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        layers: list[Any] = attention_layers(model, "mlstm")
        if model.config.logit_cap is None:
            raise InputError("models of this family have a logit_cap")
        width = their_gated_mlp(second_mixers(model))["intermediate_size"]
        return {
            **their_sizes(model, EPS),
            "num_heads": one_of_each((m.n_heads for m in layers), "n_heads"),
            "qk_dim_factor": one_of_each((values(m)["expand_k"] for m in layers), "expand_k"),
            "gate_soft_cap": one_of_each((values(m)["gate_soft_cap"] for m in layers), "gate_soft_cap"),
            "output_logit_soft_cap": model.config.logit_cap,
            "ffn_proj_factor": width / model.config.d_model,
            "ffn_round_up_to_multiple_of": 1,
        }

    def rules(self, model: LanguageModel) -> list[Rule]:
        bias = fixed("mixers.0.norm.bias", torch.zeros(model.config.d_model))
        where = range(model.config.n_layers)
        return [*stem("backbone", "embeddings", "out_norm"), *in_blocks([*BLOCK, bias], where, "backbone.blocks")]
