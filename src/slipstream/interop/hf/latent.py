"""DeepSeek's latent attention and the layers around it: what its second and third version share.

Their rotations turn neighbouring channels, ours the two halves of a head: rows of the projections that make them change places.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from slipstream.core.mixer import Mixer
from slipstream.interop.hf.decoder import GATED_MLP, NORMS, attention_layers, decoder_rules, rope, their_rope, values
from slipstream.interop.hf.experts import EXPERT_NAMES, expert_rules, feedforwards
from slipstream.interop.hf.fields import Fields, one_of_each
from slipstream.interop.hf.weights import Rule, rename, renames, rows
from slipstream.layers.rope_scaling import yarn_magnitude
from slipstream.models.language_model import LanguageModel

WIDTHS = {  # theirs -> ours, and what they take when settings do not say
    "kv_lora_rank": ("kv_rank", 512),
    "q_lora_rank": ("q_rank", None),
    "qk_nope_head_dim": ("nope_head_dim", 128),
    "qk_rope_head_dim": ("rope_head_dim", 64),
    "v_head_dim": ("v_head_dim", 128),
}


def latent_attention(hf: Fields) -> dict[str, Any]:
    """Settings of mla."""
    n = hf.whole("num_attention_heads")
    hf.only("num_key_value_heads", n)
    hf.only("attention_bias", False)
    hf.ignore("head_dim", "qk_head_dim")
    widths = {ours: hf.whole(theirs, default) for theirs, (ours, default) in WIDTHS.items()}
    scale = _scale(hf, widths["nope_head_dim"] + widths["rope_head_dim"])
    return {"n_heads": n, **widths, **rope(hf), "qk_scale": scale}


def _scale(hf: Fields, width: int) -> float | None:
    """Stretched positions may also make logits larger: by mscale_all_dim."""
    table = hf.table_of("rope_scaling") if hf.has("rope_scaling") else hf.table_of("rope_parameters")
    weight = table.number("mscale_all_dim", None)
    if not weight or table.table.get("rope_type", table.table.get("type", "default")) == "default":
        return None
    return width**-0.5 * yarn_magnitude(table.number("factor"), weight) ** 2


def their_latent_attention(model: LanguageModel) -> dict[str, Any]:
    """The inverse."""
    mixers = attention_layers(model, "mla")
    latents: list[Any] = [mixer.get_submodule("latent") for mixer in mixers]
    names = {"kv_lora_rank": "kv_rank", "qk_nope_head_dim": "nope", "qk_rope_head_dim": "rope", "v_head_dim": "value"}
    n = one_of_each((latent.n_heads for latent in latents), "n_heads")
    turns = their_rope(mixers)
    weight = _their_weight(mixers, turns)
    return {
        "num_attention_heads": n,
        "num_key_value_heads": n,
        "q_lora_rank": one_of_each((values(mixer)["q_rank"] for mixer in mixers), "q_rank"),
        **{theirs: one_of_each((vars(latent)[ours] for latent in latents), ours) for theirs, ours in names.items()},
        "rope_parameters": turns if weight is None else turns | {"mscale_all_dim": weight},
    }


def _their_weight(mixers: Iterable[Mixer], turns: dict[str, Any]) -> float | None:
    """mscale_all_dim, from the scale of logits."""
    mixers = list(mixers)
    scale = one_of_each((values(mixer)["qk_scale"] for mixer in mixers), "qk_scale")
    latent: Any = mixers[0].get_submodule("latent")
    if scale is None or turns.get("factor", 1) <= 1:
        return None
    m = math.sqrt(scale * (latent.nope + latent.rope) ** 0.5)
    return round((m - 1) / (0.1 * math.log(turns["factor"])), 9)


def latent_rules(model: LanguageModel, interleaved: bool = True) -> list[Rule]:
    """All tensors. interleaved: theirs turn neighbouring channels."""
    mla: Any = next(iter(attention_layers(model, "mla"))).get_submodule("latent")
    queries = _whole_rows(mla.n_heads, mla.nope, mla.rope, interleaved)
    keys = _whole_rows(1, mla.kv_rank, mla.rope, interleaved)
    _, sparse = feedforwards(model)
    count = values(next(iter(sparse.values())))["n_experts"]
    block = [
        *NORMS,
        *renames("self_attn", "mixers.0.latent", "q_a_proj q_a_layernorm kv_a_layernorm kv_b_proj o_proj"),
        *(rows(f"self_attn.{n}", f"mixers.0.latent.{n}", queries) for n in ("q_proj", "q_b_proj")),
        rows("self_attn.kv_a_proj_with_mqa", "mixers.0.latent.kv_a_proj_with_mqa", keys),
        *GATED_MLP,
        rename("mlp.gate.weight", "mixers.1.router.weight"),
        rename("mlp.gate.e_score_correction_bias", "mixers.1.selection_bias"),
        rename("mlp.shared_experts", "mixers.1.shared_experts"),
        *expert_rules("mlp.experts", "mixers.1.experts", count, EXPERT_NAMES),
    ]
    return decoder_rules(model, block)


def _whole_rows(n_heads: int, plain: int, turned: int, interleaved: bool) -> Tensor:
    """Which row of theirs is each of ours: in every head, `plain` rows as they are, then even before odd ones."""

    def head(start: int) -> Iterator[int]:
        yield from range(start, start + plain)
        if interleaved:
            yield from range(start + plain, start + plain + turned, 2)
            yield from range(start + plain + 1, start + plain + turned, 2)
        else:
            yield from range(start + plain, start + plain + turned)

    return torch.tensor([row for h in range(n_heads) for row in head(h * (plain + turned))], device="cpu")
