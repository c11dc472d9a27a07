"""The mixture-of-experts blocks of transformers, with their weights copied, are settings of `moe`: outputs and gradients."""

from __future__ import annotations

import importlib

import pytest
import torch

import slipstream as ss

D, F, E, K, B, T = 16, 12, 8, 3, 2, 19

# block of transformers -> fields of its configuration, settings of moe
MODELS = {
    "mixtral.Mixtral.SparseMoeBlock": ({"num_local_experts": E, "intermediate_size": F}, {}),
    "minimax.MiniMax.SparseMoeBlock": ({"num_local_experts": E, "intermediate_size": F}, {}),
    "granitemoe.GraniteMoe.MoE": ({"num_local_experts": E, "intermediate_size": F}, {}),
    "jamba.Jamba.SparseMoeBlock": ({"num_experts": E, "intermediate_size": F}, {"normalised": False}),
    "olmoe.Olmoe.SparseMoeBlock": (
        {"num_experts": E, "intermediate_size": F, "norm_topk_prob": False},
        {"normalised": False},
    ),
    "qwen3_moe.Qwen3Moe.SparseMoeBlock": (
        {"num_experts": E, "moe_intermediate_size": F, "norm_topk_prob": True},
        {"normalised": True},
    ),
    "qwen2_moe.Qwen2Moe.SparseMoeBlock": (
        {"num_experts": E, "moe_intermediate_size": F, "shared_expert_intermediate_size": 2 * F},
        {"normalised": False, "n_shared_experts": 2, "shared_gate": True},
    ),
    "qwen3_next.Qwen3Next.SparseMoeBlock": (
        {"num_experts": E, "moe_intermediate_size": F, "shared_expert_intermediate_size": F, "norm_topk_prob": True},
        {"n_shared_experts": 1, "shared_gate": True},
    ),
    "deepseek_v2.DeepseekV2.Moe": (
        {"n_routed_experts": E, "moe_intermediate_size": F, "n_shared_experts": 2, "n_group": 4, "topk_group": 2}
        | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.7, "num_local_experts": E},
        {"normalised": False, "n_shared_experts": 2, "n_groups": 4, "top_groups": 2, "group_members": 1, "scale": 1.7},
    ),
    "deepseek_v3.DeepseekV3.MoE": (
        {"n_routed_experts": E, "moe_intermediate_size": F, "n_shared_experts": 1, "n_group": 4, "topk_group": 2}
        | {"routed_scaling_factor": 2.5, "norm_topk_prob": True, "num_local_experts": E},
        {
            "gate": "sigmoid",
            "n_shared_experts": 1,
            "n_groups": 4,
            "top_groups": 2,
            "scale": 2.5,
            "selection_bias": True,
        },
    ),
    "gpt_oss.GptOss.MLP": (
        {"num_local_experts": E, "intermediate_size": F},
        {"bias": True, "clamp": 7.0},
    ),
    "longcat_flash.LongcatFlash.MoE": (
        {"n_routed_experts": E, "zero_expert_num": 3, "expert_ffn_hidden_size": F, "routed_scaling_factor": 1.5}
        | {"moe_topk": K, "num_local_experts": E},
        {"normalised": False, "scale": 1.5, "selection_bias": True, "n_copy_experts": 3},
    ),
}
NAMES = {
    "gate.weight": "router.weight",
    "router.classifier.weight": "router.weight",
    "gate.e_score_correction_bias": "selection_bias",
    "router.e_score_correction_bias": "selection_bias",
    "shared_expert_gate.weight": "shared_gate.weight",
    "experts.gate_up_proj_bias": "experts.gate_up_bias",
    "experts.down_proj_bias": "experts.down_bias",
}


def block(name: str):
    """A block of transformers in float64, every weight drawn, so large that gpt-oss's clamps bite."""
    module, model, kind = name.split(".")
    home = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    settings = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
    known = {"hidden_size": D, "num_experts_per_tok": K, "hidden_act": "silu", "num_attention_heads": 4}
    config = getattr(settings, f"{model}Config")(**known | MODELS[name][0])
    config._experts_implementation = "eager"
    made = getattr(home, model + kind)(config).double().eval()
    draw = torch.Generator().manual_seed(0)
    for tensor in made.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=draw, dtype=torch.float64) * (1 if tensor.ndim < 3 else 0.7))
    return made


def ours(name: str, theirs: torch.nn.Module):
    """A moe with its weights. gpt-oss stores the transposed, and gates and ups in turns; LongCat has unused experts of width 0."""
    mixer = ss.mixer("moe", d_model=D, n_experts=E, top_k=K, d_expert=F, **MODELS[name][1]).double()
    weights = {NAMES.get(n, n.replace("shared_expert.", "shared_experts.")): t for n, t in theirs.state_dict().items()}
    if name.startswith("gpt_oss"):
        weights = {n: t.mT if t.ndim == 3 else t for n, t in weights.items()}
        for n in ("experts.gate_up_proj", "experts.gate_up_bias"):
            weights[n] = torch.cat([weights[n][:, ::2], weights[n][:, 1::2]], 1)
    if name.startswith("longcat"):
        weights["experts.gate_up_proj"] = weights["experts.gate_up_proj"][:E]
    mixer.load_state_dict(weights)
    return mixer


@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_transformers_are_settings_of_moe(name):
    theirs = block(name)
    mixer = ours(name, theirs)
    x = torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    want = theirs(x)
    want = want[0] if isinstance(want, tuple) else want
    got = mixer(x)
    assert want.std() > 0.5  # the mechanism matters
    torch.testing.assert_close(got, want, rtol=5e-5, atol=5e-5)  # their scores are rounded to float32
    weights = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(2))
    theirs_grad, ours_grad = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (want, got))
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=5e-4, atol=5e-4)
    ys, state = [], mixer.init_state(B, T)
    with torch.no_grad():
        for t in range(T):
            y, state = mixer.step(x[:, t : t + 1], state)
            ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), want.detach(), rtol=5e-5, atol=5e-5)


def test_the_balance_loss_is_that_of_transformers():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    from slipstream.ops.balance import balance_loss
    from slipstream.ops.route import best

    logits = torch.randn(50, E, generator=torch.Generator().manual_seed(0))
    want = load_balancing_loss_func((logits,), E, K)
    load = torch.bincount(best(logits, K).flatten(), minlength=E)
    torch.testing.assert_close(K * balance_loss(logits.softmax(-1), load), want)  # theirs is k where all is even
