"""Where every head, expert or token is chosen, a mixture of attention is attention; and mistakes are told."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import slipstream as ss
from slipstream.core.errors import InputError

D, H = 16, 4


@pytest.fixture
def x():
    return torch.randn(2, 19, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)


def made(name, **settings):
    torch.manual_seed(1)
    return ss.mixer(name, d_model=D, **settings).double()


def dense(weights, **settings):
    """Attention with these weights of q, k, v and o."""
    mixer = made("attention", **settings)
    names = {"q": "qkv.q_proj.weight", "k": "qkv.k_proj.weight", "v": "qkv.v_proj.weight", "o": "o_proj.weight"}
    mixer.load_state_dict({names[n]: w for n, w in weights.items()})
    return mixer


def same(a, b, x):
    """Outputs, and gradients of x."""
    ya, yb = a(x), b(x)
    torch.testing.assert_close(ya, yb, rtol=1e-10, atol=1e-10)
    probe = torch.randn_like(ya)
    (ga,), (gb,) = (torch.autograd.grad((y * probe).sum(), x) for y in (ya, yb))
    torch.testing.assert_close(ga, gb, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n_shared", [0, 1, 2])
def test_all_heads_weighed_alike_are_attention(x, n_shared):
    moh = made("mixture_of_heads", n_heads=H, n_kv_heads=2, n_shared_heads=n_shared, top_k=H - n_shared)
    for router in moh.gates.children():
        router.weight.data.zero_()
    w = {n: moh.get_submodule(f"qkv.{n}_proj").weight for n in "qkv"} | {"o": moh.o_proj.weight}
    same(moh, dense(w, n_heads=H, n_kv_heads=2), x)


def test_heads_not_chosen_leave_no_trace(x):
    moh = made("mixture_of_heads", n_heads=H, n_shared_heads=1, top_k=2)
    moh.gates.routed.weight.data.zero_()  # the first two of the routed heads are chosen: 1 and 2
    before = moh(x)
    moh.o_proj.weight.data[:, 3 * D // H :] = 1e3
    assert torch.equal(moh(x), before)
    moh.o_proj.weight.data[:, 2 * D // H :] = 1e3
    assert not torch.allclose(moh(x), before)


def test_heads_weigh_one_in_the_mean_over_those_used(x):
    moh = made("mixture_of_heads", n_heads=8, n_shared_heads=3, top_k=3)
    moh.gates.balance.weight.data.zero_()
    g = moh.gates(x)
    torch.testing.assert_close(g[..., :3].sum(-1), torch.full((2, 19), 3.0, dtype=g.dtype))
    torch.testing.assert_close(g[..., 3:].sum(-1), torch.full((2, 19), 3.0, dtype=g.dtype))
    assert ((g > 0).sum(-1) == 6).all()


def test_all_experts_weighed_alike_are_multi_query_attention(x):
    moa = made("mixture_of_attention_heads", n_experts=H, top_k=H, head_dim=D // H)
    moa.router.weight.data.zero_()
    k, v = moa.kv_proj.weight.chunk(2)
    w = {"q": moa.q_experts.flatten(0, 1), "k": k, "v": v, "o": torch.cat(list(moa.o_experts), 1) / H}
    same(moa, dense(w, n_heads=H, n_kv_heads=1), x)


@pytest.mark.parametrize("n_experts", [1, 3])
def test_all_experts_of_a_map_are_their_sum(x, n_experts):
    """Gates of one half each, of values and of outputs."""
    switch = made("switchhead", n_heads=H, n_experts=n_experts, top_k=n_experts, head_dim=D // H, rope_fraction=1.0)
    switch.v_router.weight.data.zero_()
    switch.o_router.weight.data.zero_()
    v, o = (t.unflatten(0, (H, n_experts)).sum(1) / 2 for t in (switch.v_experts, switch.o_experts))
    w = {"q": switch.q_proj.weight, "k": switch.k_proj.weight, "v": v.flatten(0, 1), "o": torch.cat(list(o), 1)}
    same(switch, dense(w, n_heads=H), x)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n_dense", [0, 1])
def test_heads_that_choose_all_tokens_are_dense(x, causal, n_dense):
    """Their gates are one half."""
    mosa = made("mosa", n_heads=H, n_dense_heads=n_dense, sparsity=1, rope_fraction=1.0, causal=causal)
    mosa.router.weight.data.zero_()
    parts = [t.flatten(0, 1) for t in mosa.qkv_heads.chunk(3, 1)]
    o = torch.cat(list(mosa.o_heads), 1) / 2
    if n_dense:
        parts = [torch.cat(pair) for pair in zip(parts, mosa.qkv_proj.weight.chunk(3))]
        o = torch.cat([o, mosa.o_proj.weight], 1)
    same(mosa, dense(dict(zip("qkv", parts)) | {"o": o}, n_heads=H, causal=causal), x)


@pytest.mark.parametrize("settings", [{}, {"include_first": True}, {"causal": False}])
def test_packed_documents_choose_by_their_own_length(settings):
    mosa = made("mosa", n_heads=H, sparsity=3, **settings)
    row = torch.randn(1, 50, D, dtype=torch.float64)
    bounds = [0, 1, 14, 14, 24, 50]
    alone = [mosa(row[:, a:b]) for a, b in pairwise(bounds)]
    torch.testing.assert_close(mosa(row, torch.tensor(bounds)), torch.cat(alone, 1))


def test_a_head_chooses_the_first_of_equal_tokens_and_the_first_token_where_told(x):
    mosa = made("mosa", n_heads=H, sparsity=5)
    place, counts = mosa._chosen(torch.zeros(1, 2, 19), None)
    assert place.tolist() == [[[0, 1, 2]] * 2] and counts.tolist() == [3]
    with_first = made("mosa", n_heads=H, sparsity=5, include_first=True)
    place, _ = with_first._chosen(torch.arange(19.0).expand(1, 2, 19), None)
    assert place.tolist() == [[[0, 17, 18]] * 2]


def test_more_experts_cost_no_more():
    """What was not chosen is not computed, in a whole pass and in a step; only the router grows."""
    settings = {"mixture_of_attention_heads": {"top_k": 3, "head_dim": 4}, "switchhead": {"head_dim": 4}}
    x = torch.randn(2, 32, D)
    for name, fixed in settings.items():
        spent = []
        for n_experts in (4, 32):
            mixer = ss.mixer(name, d_model=D, n_experts=n_experts, **fixed)
            state = mixer.init_state(2, 40)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                mixer.step(x[:, :1], mixer.prefill(x, state)[1])
            routers = sum(m.weight.numel() for n, m in mixer.named_modules() if n.endswith("router"))
            spent.append(counter.get_total_flops() - 2 * 2 * 33 * routers)
        assert spent[0] == spent[1]


@pytest.mark.parametrize(
    ("name", "settings", "complaint"),
    [
        ("mixture_of_heads", {"n_heads": 4, "n_shared_heads": 3}, r"top_k 2 must be from 2 .* to the 1 of 4 heads"),
        ("mixture_of_heads", {"n_heads": 4, "top_k": 1}, "would not learn"),
        ("mixture_of_attention_heads", {"top_k": 1}, "would not learn"),
        ("mixture_of_attention_heads", {"n_experts": 3, "top_k": 4}, "to n_experts 3"),
        ("mixture_of_attention_heads", {"head_dim": 5}, "head_dim 5 must be even"),
        ("switchhead", {"top_k": 5}, "from 1 to n_experts 4"),
        ("switchhead", {"head_dim": 6}, "rope_fraction 0.5 of head_dim 6 is 3"),
        ("mosa", {"n_heads": 4, "n_dense_heads": 4}, "n_dense_heads 4 must be from 0"),
        ("mosa", {"sparsity": 0}, "sparsity"),
    ],
)
def test_settings_that_cannot_be_are_told(name, settings, complaint):
    with pytest.raises(InputError, match=complaint):
        ss.mixer(name, d_model=D, **settings)
