"""Mixtures of experts: what they equal where they must, what they leave unread, what they tell, and mistakes in words."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import slipstream as ss
from slipstream.core.auxiliary import Collector
from slipstream.core.errors import InputError

D, F, E = 16, 12, 4
TOKEN_CHOICE = ["moe", "adaptive_moe", "threshold_moe", "hash_moe", "switch_moe"]


@pytest.fixture
def x():
    return torch.randn(2, 19, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)


def made(name, **settings):
    torch.manual_seed(1)
    return ss.mixer(name, d_model=D, **settings).double()


def alike(mixer):
    """A dense SwiGLU of one expert's weights, which all experts are given."""
    experts = mixer.experts
    for p in (experts.gate_up_proj, experts.down_proj):
        p.data.copy_(p.data[:1].clone().expand_as(p))
    dense = made("swiglu", d_ff=F)
    gate, up = experts.gate_up_proj[0].chunk(2)
    dense.load_state_dict({"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": experts.down_proj[0]})
    return dense


def same(a, b, x):
    ya, yb = a(x), b(x)
    torch.testing.assert_close(ya, yb, rtol=1e-10, atol=1e-10)
    probe = torch.randn_like(ya)
    (ga,), (gb,) = (torch.autograd.grad((y * probe).sum(), x) for y in (ya, yb))
    torch.testing.assert_close(ga, gb, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("moe", {}),
        ("moe", {"gate": "sigmoid", "top_k": 3}),
        ("hash_moe", {"n_hashes": 3}),
        ("adaptive_moe", {"top_p": 1.0, "max_experts": E}),
        ("switch_moe", {"top_k": E, "capacity_factor": 1.0}),
        ("expert_choice_moe", {"top_k": E}),
    ],
)
def test_equal_experts_are_a_dense_network(x, name, settings):
    """Where weights sum to one."""
    mixer = made(name, n_experts=E, d_expert=F, **settings)
    same(mixer, alike(mixer), x)


def test_adaptive_with_the_most_of_two_is_top_2_without_normalised_weights(x):
    adaptive = made("adaptive_moe", n_experts=E, d_expert=F, top_p=1.0, max_experts=2)
    moe = made("moe", n_experts=E, d_expert=F, normalised=False)
    moe.load_state_dict(adaptive.state_dict())
    same(adaptive, moe, x)


def test_switch_with_room_for_all_is_moe(x):
    switch = made("switch_moe", n_experts=E, d_expert=F, top_k=2, capacity_factor=E)
    moe = made("moe", n_experts=E, d_expert=F, normalised=False)
    moe.load_state_dict(switch.state_dict())
    same(switch, moe, x)


def test_an_expert_that_is_full_drops_who_comes_later():
    switch = made("switch_moe", n_experts=E, d_expert=F, stretch=8, capacity_factor=1.0)
    x = torch.randn(1, 1, D, dtype=torch.float64).expand(1, 20, D)  # all ask for one expert, which takes 2 of 8
    served = switch(x)[0].abs().sum(-1) > 0
    assert served.tolist() == [t % 8 < 2 for t in range(20)]


def test_tokens_that_no_score_reaches_get_nothing(x):
    threshold = made("threshold_moe", n_experts=E, d_expert=F)
    weight = threshold.router.weight.data
    weight.copy_(-weight[:1].expand_as(weight))
    y, score = threshold(x), x @ weight[0]
    assert torch.equal(y.abs().sum(-1) > 0, score > 0)


@pytest.mark.parametrize("name", TOKEN_CHOICE)
def test_a_step_reads_the_experts_it_chose_and_no_other(x, name):
    mixer = made(name, n_experts=8, d_expert=F)
    with torch.no_grad():
        want, _ = mixer.step(x[:1, :1], mixer.init_state(1))
        unread = 0
        for e in range(8):
            kept = mixer.experts.gate_up_proj[e].clone()
            mixer.experts.gate_up_proj[e] = torch.nan
            unread += torch.equal(mixer.step(x[:1, :1], mixer.init_state(1))[0], want)
            mixer.experts.gate_up_proj[e] = kept
    assert unread >= 8 - {"moe": 2, "adaptive_moe": 4, "threshold_moe": 7}.get(name, 1)


def test_experts_without_work_say_what_they_are_to_say(x):
    """The router is forced to one of each kind at a time."""
    moe = made(
        "moe",
        n_experts=1,
        d_expert=F,
        top_k=1,
        normalised=False,
        n_null_experts=1,
        n_copy_experts=1,
        n_constant_experts=1,
    )
    v, blend = moe.free.constants[0], moe.free.blend(x).softmax(-1)
    says = [torch.zeros_like(x), x, blend[..., :1] * x + blend[..., 1:] * v]
    for i, want in enumerate(says, start=1):
        moe.router.weight.data.zero_()
        moe.choose = lambda logits, i=i: torch.full((*logits.shape[:-1], 1), i)
        torch.testing.assert_close(moe(x), want / 4)  # a softmax of four equal scores
        torch.testing.assert_close(moe.reference(x), want / 4)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_all_kinds_together_are_the_equation(x, gate, normalised):
    moe = made("moe", n_experts=3, d_expert=F, top_k=3, n_null_experts=2, n_copy_experts=1, n_constant_experts=2, gate=gate,
               normalised=normalised, selection_bias=True, bias=True, clamp=0.5, scale=1.3)  # fmt: skip
    for p in moe.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    moe.selection_bias.copy_(torch.randn(8))
    same(moe, moe.reference, x)
    with torch.no_grad():
        step, _ = moe.step(x[:, :1], moe.init_state(2))
    torch.testing.assert_close(step, moe(x)[:, :1])


def test_the_selection_bias_moves_the_choice_and_not_the_weights(x):
    moe = made("moe", n_experts=E, d_expert=F, selection_bias=True, bias_rate=0.1, normalised=False)
    before = moe(x)
    moe.selection_bias.add_(3.0)
    torch.testing.assert_close(moe(x), before)
    moe.selection_bias[2:] += 5.0
    logits = moe.router(x)
    assert set(moe.choose(logits).unique().tolist()) == {2, 3}
    p = logits.softmax(-1)[..., 2:]
    both = torch.stack([moe.experts.reference(x_t, [2, 3], p_t) for x_t, p_t in zip(x[0], p[0])])
    torch.testing.assert_close(moe(x)[0], both)


def test_active_parameters_are_those_of_the_chosen():
    model = ss.language_model("gated_deltanet/moe(n_experts=16, top_k=2)", n_layers=2, d_model=32)
    one = sum(p[0].numel() for p in model.stack.mixers()[1].experts.parameters())
    assert model.n_parameters() - model.n_active_parameters() == 2 * 14 * one
    dense = ss.language_model("gated_deltanet", n_layers=2, d_model=32)
    assert model.n_active_parameters() - dense.n_parameters() == 2 * 16 * 32  # of the routers
    moe = model.stack.mixers()[1]
    all_read, one_read = (moe.cost(64, B, "step").bytes for B in (10_000, 1))
    assert all_read == sum(p.nbytes for p in moe.parameters()) and all_read - one_read == 4 * 14 * one


def test_more_experts_cost_no_more():
    x, spent = torch.randn(2, 32, D), []
    for n_experts in (4, 32):
        moe = ss.mixer("moe", d_model=D, n_experts=n_experts)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            moe(x)
        spent.append(counter.get_total_flops() - 2 * 64 * D * n_experts)
    assert spent[0] == spent[1]


@pytest.mark.parametrize("name", TOKEN_CHOICE)
def test_what_was_chosen_is_told_to_a_collector_that_listens_and_else_to_nobody(x, name):
    mixer, collector = made(name, n_experts=E, d_expert=F), Collector()
    plain = mixer(x)
    assert not collector.usage
    with collector.listening():
        assert torch.equal(mixer(x), plain)
    (usage,) = collector.usage.values()
    assert usage.tokens == 38 and len(usage.load) == E
    if name in ("moe", "switch_moe"):
        assert usage.load.sum() == 38 * mixer.config.top_k
    penalty = collector.penalty()
    if name != "hash_moe":
        (grad,) = torch.autograd.grad(penalty, mixer.router.weight)
        assert grad.abs().sum() > 0
    assert collector.penalty() == 0  # what was heard is counted once
    mixer(x)
    assert collector.usage[mixer].tokens == 38


def test_padding_is_not_counted():
    switch, collector = made("switch_moe", n_experts=E, d_expert=F), Collector()
    x, lengths = torch.randn(2, 9, D, dtype=torch.float64), torch.tensor([9, 4])
    with collector.listening():
        switch.prefill(x, switch.init_state(2), lengths)
    assert collector.usage[switch].tokens == 13


def test_the_loss_of_a_batch_read_in_parts_is_judged_by_all_that_was_read(x):
    moe, collector = made("moe", n_experts=E, d_expert=F, z_loss=0.0, balance_loss=1.0), Collector()
    penalties = []
    for row in x:
        with collector.listening():
            moe(row[None])
        penalties.append(collector.penalty())
    p = moe.router(x).softmax(-1)
    load = torch.bincount(moe.choose(moe.router(x)).flatten(), minlength=E).double()
    torch.testing.assert_close(penalties[1], E * (load / load.sum() * p[1].mean(0)).sum())


def test_the_l1_loss_of_relu_routing_follows_the_number_that_is_used(x):
    """ReMoE: lambda E / (k T) sum load r, and lambda up while more than top_k are used."""
    mixer, collector = made("threshold_moe", n_experts=E, d_expert=F, top_k=1, first_loss=0.5), Collector()
    with collector.listening():
        mixer(x)
    r = mixer.router(x).relu().flatten(0, 1)
    want = 0.5 * E / 38 * ((r > 0).sum(0) * r.mean(0)).sum()
    torch.testing.assert_close(collector.penalty(), want)
    assert collector.usage[mixer].load.sum() > 38
    collector.settle()
    torch.testing.assert_close(float(mixer.sparsity_loss), 0.6)
    collector.usage[mixer].load = torch.tensor([5, 5, 5, 5])
    collector.settle()
    torch.testing.assert_close(float(mixer.sparsity_loss), 0.5)


@pytest.mark.parametrize("name", ["moe", "switch_moe"])
def test_a_layer_that_is_computed_again_for_its_gradient_tells_once(x, name):
    mixer, grads = made(name, n_experts=E, d_expert=F, balance_loss=1.0), []
    for run in (mixer, lambda x: checkpoint(mixer, x, use_reentrant=False)):
        collector = Collector()
        with collector.listening():
            y = run(x)
        grads.append(torch.autograd.grad(y.square().sum() + collector.penalty(), [x, *mixer.parameters()]))
        assert collector.usage[mixer].tokens == 38
    torch.testing.assert_close(grads[0], grads[1])


def test_reversible_layers_refuse_experts_in_words_where_they_are_balanced():
    model = ss.language_model("attention/moe", n_layers=2, d_model=16, reversible=True)
    tokens = torch.zeros(1, 5, dtype=torch.long)
    model(tokens).sum().backward()  # without losses there is nothing to refuse
    with Collector().listening(), pytest.raises(InputError, match="mixture of experts cannot be trained in reversible"):
        model(tokens)
    dense = ss.language_model("attention", n_layers=2, d_model=16, reversible=True)
    with Collector().listening():
        dense(tokens).sum().backward()


def test_expert_choice_is_refused_by_a_language_model():
    with pytest.raises(InputError, match="those to come included"):
        ss.language_model("attention/expert_choice_moe", n_layers=1, d_model=16)


def test_every_expert_has_the_same_load(x):
    mixer = made("expert_choice_moe", n_experts=E, d_expert=F)
    scores = mixer.router(x).softmax(-1).mT
    place, own = mixer._picks(scores, torch.tensor([19, 6]))
    assert own.sum(-1).tolist() == [[10], [3]]
    assert place[1].masked_fill(~own[1], 0).max() < 6  # none of the padding


@pytest.mark.parametrize(
    ("name", "settings", "complaint"),
    [
        ("moe", {"top_k": 9}, "top_k 9 must be from 1 to the 8 experts"),
        ("moe", {"top_k": 1}, "would not learn; normalised=false"),
        ("moe", {"shared_gate": True}, "shared_gate needs n_shared_experts"),
        ("moe", {"n_groups": 3}, "groups must be of equal size"),
        ("moe", {"n_groups": 4, "top_k": 3}, "must hold top_k 3"),
        ("moe", {"n_groups": 8, "top_groups": 2}, "by 2 members"),
        ("adaptive_moe", {"max_experts": 9}, "max_experts 9"),
        ("threshold_moe", {"max_experts": 1}, "from top_k 2"),
        ("hash_moe", {"n_experts": 6}, "power of two, like 4"),
        ("switch_moe", {"top_k": 9}, "top_k 9"),
        ("expert_choice_moe", {"top_k": 9}, "top_k 9"),
    ],
)
def test_settings_that_cannot_be_are_told(name, settings, complaint):
    with pytest.raises(InputError, match=complaint):
        ss.mixer(name, d_model=D, **settings)
