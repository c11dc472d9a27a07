"""A mixture over whole sequences is the same choice by choice: outputs, gradients, nothing computed for choices of none."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slipstream.ops.expert_mlp import expert_mlp, expert_mlp_flops, reference

T, E, K, D, F = 29, 5, 2, 6, 4


def gated(h):
    gate, up = h.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def made(tokens=T, n_experts=E, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    dims = {"x": (tokens, D), "weights": (tokens, K), "gate_up": (n_experts, 2 * F, D), "down": (n_experts, D, F)}
    lines = {n: torch.randn(*d, dtype=dtype, generator=draw).requires_grad_() for n, d in dims.items()}
    chosen = torch.rand(tokens, n_experts + 1, generator=draw).argsort(-1)[:, :K]  # now and then none
    return lines | {"chosen": chosen, "gated": gated}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [T, 1, 0])
def test_it_is_the_sum_choice_by_choice(tokens, bias):
    given = made(tokens)
    if bias:
        given["bias"] = torch.randn(E, 2 * F, dtype=torch.float64, requires_grad=True)
    leaves = [t for t in given.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    got, want = expert_mlp(**given), reference(**given)
    torch.testing.assert_close(got, want)
    if tokens == T:
        probe = torch.randn_like(want)
        for a, b in zip(*(torch.autograd.grad((y * probe).sum(), leaves) for y in (got, want))):
            torch.testing.assert_close(a, b)


def test_experts_that_nobody_chose_get_a_gradient_of_zero():
    given = made() | {"chosen": torch.tensor([[3, 1]]).expand(T, K)}
    expert_mlp(**given).sum().backward()
    assert [bool(g.any()) for g in given["gate_up"].grad] == [False, True, False, True, False]
    assert [bool(g.any()) for g in given["down"].grad] == [False, True, False, True, False]


def test_a_token_that_chooses_none_gets_nothing_and_costs_nothing():
    given = made() | {"chosen": torch.tensor([[E, E]]).expand(T, K)}
    with FlopCounterMode(display=False) as counter:
        y = expert_mlp(**given)
        y.sum().backward()
    assert counter.get_total_flops() == 0 and not y.any() and not given["x"].grad.any()


def test_work_is_that_of_the_chosen():
    given = made(n_experts=40)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        expert_mlp(**given)
    assert counter.get_total_flops() == expert_mlp_flops(int((given["chosen"] < 40).sum()), D, F)


def test_what_is_kept_for_the_gradient_does_not_grow_with_the_number_of_experts():
    kept = []
    for n_experts in (4, 64):
        given, sizes = made(500, n_experts) | {"chosen": torch.rand(500, n_experts).argsort(-1)[:, :K]}, {}

        def note(t, sizes=sizes):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            expert_mlp(**given)
        kept.append(sum(sizes.values()) - given["gate_up"].nbytes - given["down"].nbytes)
    assert kept[1] < 1.1 * kept[0]


def test_autocast_computes_in_its_precision_with_gradients_in_the_weights():
    given = made(dtype=torch.float32)
    want = expert_mlp(**given)
    with torch.autocast("cpu", torch.bfloat16):
        y = expert_mlp(**given)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want, rtol=0.1, atol=0.1)
    y.sum().backward()
    assert given["gate_up"].grad.dtype == torch.float32
