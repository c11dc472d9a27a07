"""Norms against the loop: outputs and gradients, with and without weight and gate, slices, extremes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slipstream.ops import l2_norm as unit
from slipstream.ops import rms_norm as ops

SHAPES = [(2, 5, 7), (3, 33), (1, 1, 16), (0, 4), (2, 0, 4)]
SETTINGS = {
    "plain": (False, False, False),
    "weight": (True, False, False),
    "gate": (True, True, False),
    "gate first": (True, True, True),
    "gate alone": (False, True, False),
}


def given(shape: tuple[int, ...], name: str, dtype: torch.dtype = torch.float64) -> dict:
    draw = torch.Generator().manual_seed(0)
    weight, gate, first = SETTINGS[name]

    def normal(*dims: int) -> Tensor:
        return (2 * torch.randn(*dims, dtype=torch.float64, generator=draw)).to(dtype)

    more = ({"weight": normal(shape[-1])} if weight else {}) | ({"gate": normal(*shape)} if gate else {})
    return {"x": normal(*shape), **more, "gate_first": first, "eps": 1e-5}


def outcome(f, arguments: dict) -> list[Tensor]:
    leaves = {n: v.clone().requires_grad_() if isinstance(v, Tensor) else v for n, v in arguments.items()}
    y = f(**leaves)
    inputs = [v for v in leaves.values() if isinstance(v, Tensor)]
    return [y.detach(), *torch.autograd.grad((y * torch.sin(torch.arange(y.numel())).view_as(y)).sum(), inputs)]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_is_its_definition(shape, name):
    got, want = (outcome(f, given(shape, name)) for f in (ops.rms_norm, ops.reference))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_unit_length_is_its_definition(shape):
    x = {"x": given(shape, "plain")["x"]}
    torch.testing.assert_close(outcome(unit.l2_norm, x), outcome(unit.reference, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SETTINGS)
def test_float32_is_near_float64(name):
    got, want = (outcome(ops.rms_norm, given((40, 100), name, d)) for d in (torch.float32, torch.float64))
    torch.testing.assert_close(got, [w.float() for w in want], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES[3:], ids=str)
def test_no_rows(shape):
    y, *slopes = outcome(ops.rms_norm, given(shape, "gate"))
    assert y.shape == shape and slopes[0].shape == shape and not slopes[1].any()


def test_slices_of_wider_rows_and_turned_ones():
    wide = torch.randn(2, 6, 3, 10, dtype=torch.float64)
    for x, gate in (
        (wide[..., 2:7], wide[..., 5:]),
        (wide[:, 1:4, :, :5], wide[:, 2:5, :, 5:]),
        (wide[:, :, :1, :5], wide[:, :, 1:2, 5:]),
        (wide.transpose(1, 2), wide.transpose(1, 2) + 1),
        (wide.mT, wide.mT + 1),
    ):
        want = ops.reference(x.contiguous(), None, 1e-6, gate.contiguous())
        torch.testing.assert_close(ops.rms_norm(x, None, 1e-6, gate), want, rtol=1e-10, atol=1e-10)


def test_zeros_have_a_gradient_and_large_numbers_an_answer():
    x = torch.zeros(2, 8, requires_grad=True)
    unit.l2_norm(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.all()
    assert ops.rms_norm(torch.full((1, 8), 1e15)).allclose(torch.ones(8))
    assert ops.rms_norm(torch.tensor([[float("nan"), 1.0]])).isnan().all()
