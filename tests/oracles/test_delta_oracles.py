"""Matrix-state mixers against outside code with the same weights.

transformers' layers for gated_deltanet and kda (in float32: they compute in it), a whole pass and cached decoding;
stored arrays, made by the scripts beside this file, for the others.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention, chunk_kimi_delta_attention
from transformers.models.qwen3_next import modeling_qwen3_next as qwen
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig

import slipstream as ss
from slipstream.ops.delta_scan import delta_scan, dplr_scan
from slipstream.ops.outer_scan import outer_scan

from . import make_linear_attention


def load(name):
    return {n: torch.from_numpy(a) for n, a in np.load(Path(__file__).with_name(f"{name}.npz")).items()}


D, T, PREFIX, B = 48, 37, 20, 2


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomise(layer):
    """Weights large enough for every term to matter."""
    for name, p in layer.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.3)
    return layer.eval()


def qwen_pair():
    """2 query and key heads of 8 serve 4 value heads of 12."""
    config = Qwen3NextConfig(
        hidden_size=D, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=12,
        linear_conv_kernel_dim=4, num_hidden_layers=1, layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = randomise(qwen.Qwen3NextGatedDeltaNet(config, 0))
    ours = ss.mixer("gated_deltanet", d_model=D, n_heads=2, n_v_heads=4, head_dim=8, expand_v=1.5).eval()
    q, k, v, z = theirs.in_proj_qkvz.weight.unflatten(0, (2, -1)).split([8, 8, 24, 24], 1)  # by key head
    b, a = theirs.in_proj_ba.weight.unflatten(0, (2, -1)).split(2, 1)
    q_conv, k_conv, v_conv = theirs.conv1d.weight.split([16, 16, 48])
    ours.load_state_dict({
        "q_proj.weight": q.flatten(0, 1), "k_proj.weight": k.flatten(0, 1), "v_proj.weight": v.flatten(0, 1),
        "g_proj.weight": z.flatten(0, 1), "a_proj.weight": a.flatten(0, 1), "b_proj.weight": b.flatten(0, 1),
        "q_conv1d.weight": q_conv, "k_conv1d.weight": k_conv, "v_conv1d.weight": v_conv,
        "A_log": theirs.A_log, "dt_bias": theirs.dt_bias, "o_norm.weight": theirs.norm.weight,
        "o_proj.weight": theirs.out_proj.weight,
    })  # fmt: skip
    return theirs, ours, config


def kimi_pair():
    config = KimiLinearConfig(
        hidden_size=D, linear_head_dim=8, linear_num_heads=3, linear_conv_kernel_dim=4, num_hidden_layers=1,
        layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = randomise(KimiLinearDeltaAttention(config, 0))
    ours = ss.mixer("kda", d_model=D, n_heads=3, head_dim=8).eval()
    weights = {n.removeprefix("forget_gate."): p for n, p in theirs.named_parameters()}
    weights["A_log"] = weights["A_log"].flatten()
    convs = weights.pop("conv1d.weight").chunk(3)
    ours.load_state_dict(weights | {f"{n}_conv1d.weight": conv for n, conv in zip("qkv", convs)})
    return theirs, ours, config


@pytest.mark.parametrize("pair", [qwen_pair, kimi_pair])
def test_a_whole_pass_is_theirs(pair):
    theirs, ours, _ = pair()
    x = torch.randn(B, T, D)
    with torch.no_grad():
        want, got = theirs(x), ours(x)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pair", [qwen_pair, kimi_pair])
def test_prefill_and_steps_are_their_cached_decoding(pair):
    theirs, ours, config = pair()
    x, cache, state = torch.randn(B, T, D), DynamicCache(config=config), ours.init_state(B)
    with torch.no_grad():
        want = [theirs(x[:, :PREFIX], cache_params=cache)]
        y, state = ours.prefill(x[:, :PREFIX], state)
        got = [y]
        for t in range(PREFIX, T):
            want.append(theirs(x[:, t : t + 1], cache_params=cache))
            y, state = ours.step(x[:, t : t + 1], state)
            got.append(y)
    torch.testing.assert_close(torch.cat(got, 1), torch.cat(want, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["S"], cache.get_recurrent_state(0, state_idx=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_op_is_theirs_with_its_state(per_channel):
    H, K, V = 3, 16, 24
    q, k, v = torch.randn(B, 150, H, K), F.normalize(torch.randn(B, 150, H, K), dim=-1), torch.randn(B, 150, H, V)
    beta, S = torch.rand(B, 150, H), torch.randn(B, H, K, V)
    log_decay = F.logsigmoid(torch.randn(*k.shape if per_channel else beta.shape))
    theirs = chunk_kimi_delta_attention if per_channel else qwen.torch_chunk_gated_delta_rule
    want_o, want_S = theirs(q, k, v, g=log_decay, beta=beta, initial_state=S, output_final_state=True)
    o, S = delta_scan(q, k, v, beta, log_decay, S, scale=K**-0.5)
    torch.testing.assert_close(o, want_o, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(S, want_S, rtol=1e-4, atol=1e-5)


STORED = {
    "linear_transformer": {},
    "performer": {"n_features": 5},
    "gated_linear_attention": {},
    "retnet": {},
    "deltanet": {},
}


@pytest.mark.parametrize("name", STORED)
def test_stored_arrays_are_met(name):
    stored = {n.partition("/")[2]: t for n, t in load("linear_attention").items() if n.startswith(name + "/")}
    x, y = stored.pop("x"), stored.pop("y")
    mixer = ss.mixer(name, d_model=x.shape[-1], n_heads=2, **STORED[name]).double()
    mixer.load_state_dict(stored)
    assert y.std() > 0.1
    torch.testing.assert_close(mixer(x), y, rtol=1e-10, atol=1e-10)


def test_the_stored_arrays_are_what_their_maker_makes():
    made, stored = make_linear_attention.make(), load("linear_attention")
    assert made.keys() == stored.keys()
    for name, array in made.items():
        np.testing.assert_allclose(array, stored[name], rtol=1e-9, atol=1e-12)


SCALE = 8**-0.5
FLA = {  # operator of fla -> ours over the stored inputs
    "retention": lambda x: outer_scan(
        x["q"], x["k"], x["v"], torch.log1p(-(2.0 ** (-5 - torch.arange(2)))), scale=SCALE
    ),
    "gla": lambda x: outer_scan(x["q"], x["k"], x["v"], x["per_channel"], scale=SCALE),
    "simple_gla": lambda x: outer_scan(x["q"], x["k"], x["v"], x["per_head"], scale=SCALE),
    "delta": lambda x: delta_scan(x["q"], x["k"], x["v"], x["beta"], scale=SCALE),
    "gated_delta": lambda x: delta_scan(x["q"], x["k"], x["v"], x["beta"], x["per_head"], scale=SCALE),
    "kda": lambda x: delta_scan(x["q"], x["k"], x["v"], x["beta"], x["per_channel"], scale=SCALE),
    "dplr": lambda x: dplr_scan(
        *(x[n] for n in ("q", "k", "v", "read", "write", "per_channel")), scale=SCALE, erase="undecayed"
    ),
}


@pytest.mark.parametrize("op", FLA)
def test_the_ops_are_those_of_fla(op):
    stored = load("fla_ops")
    o, S = FLA[op](stored)
    torch.testing.assert_close(o, stored[f"{op}/o"], rtol=1e-4, atol=1e-5)
    if op != "retention":  # theirs gives no state
        torch.testing.assert_close(S, stored[f"{op}/S"], rtol=1e-4, atol=1e-5)


def test_rwkv7_is_the_official_package():
    stored = {n: t for n, t in load("rwkv7").items() if not n.startswith("channel_mix")}
    x, y, wkv = (stored.pop(n) for n in ("x", "y", "state"))
    eps = 64e-5 / 8  # theirs is fixed, for heads of 64
    mixer = ss.mixer("rwkv7", d_model=16, n_heads=2, decay_rank=3, rate_rank=3, gate_rank=3, norm_eps=eps)
    mixer.load_state_dict(stored)
    with torch.no_grad():
        got, state = mixer.prefill(x[None], mixer.init_state(1))
    assert y.std() > 0.1
    torch.testing.assert_close(got[0], y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["S"][0].mT, wkv, rtol=1e-4, atol=1e-5)
