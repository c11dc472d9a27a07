"""The gate against its definition: outputs, gradients, slices, extremes."""

from __future__ import annotations

import pytest
import torch

from slipstream.ops.silu_gate import reference, silu_gate


def pair(*dims: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [(3 * torch.randn(*dims, dtype=dtype, generator=draw)).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("dims", [(3, 5, 19), (7,), (1, 1, 16), (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_is_its_definition(dims, dtype):
    found = []
    for f in (silu_gate, reference):
        x, gate = pair(*dims, dtype=dtype)
        y = f(x, gate)
        found.append([y, *torch.autograd.grad(y.square().sum(), (x, gate))])
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)


def test_slices_of_wider_rows_and_turned_ones():
    wide = torch.randn(4, 6, 20, dtype=torch.float64)
    for x, gate in ((wide[..., :10], wide[..., 10:]), (wide.mT, wide.mT + 1)):
        torch.testing.assert_close(silu_gate(x, gate), reference(x, gate), rtol=1e-10, atol=1e-10)


def test_a_closed_gate_is_zero_and_an_open_one_passes():
    gate = torch.tensor([-1e4, -200.0, 200.0, 1e4, float("nan")])
    y = silu_gate(torch.ones(5), gate)
    assert y[:2].tolist() == [0, 0] and y[2:4].tolist() == [200, 1e4] and y[4].isnan()
