"""Few rows, each by its expert: both forms against row by row, and numbers that are no expert."""

from __future__ import annotations

import pytest
import torch

from slipstream.ops.backends.cpp.library import find_compiler
from slipstream.ops.dispatch import Call, chosen, torch_forms
from slipstream.ops.expert_linear import expert_linear, reference

E, I, O = 5, 21, 7


def made(*batch, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(*batch, I, dtype=dtype, generator=draw)
    weight = torch.randn(E, O, I, dtype=dtype, generator=draw)
    return rows, weight, torch.randint(0, E + 2, batch, generator=draw)


@pytest.mark.parametrize("batch", [(1, 1, 2), (7, 1, 3), (0,), (4,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_both_forms_are_row_by_row(batch, dtype):
    rows, weight, experts = made(*batch, dtype=dtype)
    want = reference(rows, weight, experts)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(expert_linear(rows, weight, experts), want, rtol=tolerance, atol=tolerance)
    with torch_forms():
        torch.testing.assert_close(expert_linear(rows, weight, experts), want, rtol=tolerance, atol=tolerance)


def test_one_row_spread_over_its_choices_is_read_as_it_lies():
    rows, weight, _ = made(1, 1)
    experts = torch.tensor([[[4, 0, 4]]])
    spread = rows[..., None, :].expand(1, 1, 3, I)
    torch.testing.assert_close(expert_linear(spread, weight, experts), reference(spread, weight, experts))


def test_gradients_are_those_of_the_chosen():
    rows, weight, experts = made(6)
    leaves = [rows.requires_grad_(), weight.requires_grad_()]
    probe = torch.randn(6, O, dtype=torch.float64)
    got, want = (
        torch.autograd.grad((f(rows, weight, experts) * probe).sum(), leaves) for f in (expert_linear, reference)
    )
    torch.testing.assert_close(got, want)


def test_the_kernel_runs_where_no_gradient_is_wanted():
    assert chosen("expert_linear", Call("cpu", torch.float32, False)) == ("cpp" if find_compiler() else "torch")
    assert chosen("expert_linear", Call("cpu", torch.float32, True)) == "torch"
