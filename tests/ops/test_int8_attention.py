"""Logits of 8-bit integers against their definition in integers, and what the rounding costs, with the keys' mean and without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from slipstream.ops import int8_attention as ops
from slipstream.ops.attention import attention
from slipstream.ops.softmax import PLAIN, Softmax
from slipstream.policies.policy import prefill_policy

SETTINGS = {
    "plain": PLAIN,
    "scaled": Softmax(scale=0.3),
    "capped": Softmax(cap=2.0),
    "sinks": Softmax(sinks=torch.tensor([0.5, -3.0, 0.0, 2.0], dtype=torch.float64)),
}


def lines(B: int, T: int, S: int, H: int, G: int, K: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(B, *n, K, generator=draw, dtype=dtype) for n in ((T, H), (S, G), (S, G))]


def test_whole_numbers_fill_eight_bits_block_by_block():
    x = lines(2, 11, 1, 3, 3, 5)[0] * torch.logspace(-3, 3, 11)[:, None, None]
    x[:, 8:] = 0
    whole, factor = ops.to_int8(x, 4)
    assert torch.equal(whole, whole.round()) and whole.abs().amax((1, 3)).eq(127).all()
    assert factor[:, :4].eq(factor[:, :1]).all() and factor[:, 4:8].gt(factor[:, :4]).all()
    assert ((whole * factor[..., None] - x).abs() <= factor[..., None] / 2 + 1e-12).all()


@pytest.mark.parametrize("name", SETTINGS)
def test_it_is_its_definition_in_integers(name, monkeypatch):
    for size, value in (("QUERIES", 4), ("KEYS", 3), ("TOGETHER", 8)):
        monkeypatch.setattr(ops, size, value)
    q, k, v = lines(2, 11, 20, 4, 2, 6)
    past = torch.tensor([9, 0])
    k[1, 11:] = 0  # what stands behind a row would share a factor with its last keys
    raised = torch.randn(2, 11, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got, want = (f(q, k, v, past, SETTINGS[name], raised) for f in (ops.int8_attention, ops.reference))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_float32_multiplies_the_integers_exactly():
    q, k, _ = lines(1, 64, 64, 1, 1, 1024, torch.float32)
    (a, _), (b, _) = ops.to_int8(q, 1), ops.to_int8(k, 1)
    exact = a[0, :, 0].to(torch.int32) @ b[0, :, 0].to(torch.int32).T
    assert torch.equal((a[0, :, 0] @ b[0, :, 0].T).to(torch.int32), exact)


def test_gradients_reach_the_values():
    q, k, v = lines(1, 9, 9, 2, 1, 4)
    past, seed = torch.tensor([0]), torch.randn(1, 9, 2, 4, dtype=torch.float64)
    leaf = v.clone().requires_grad_()
    (grad,) = torch.autograd.grad((ops.int8_attention(q, k, leaf, past) * seed).sum(), leaf)
    basis = torch.eye(9, dtype=torch.float64).reshape(1, 9, 1, 9)
    weights = ops.int8_attention(q, k, basis, past)
    torch.testing.assert_close(grad[:, :, 0], torch.einsum("bths,bthv->bsv", weights, seed), rtol=1e-10, atol=1e-10)


def test_flops_are_those_counted():
    q, k, v = lines(2, 700, 700, 4, 2, 8, torch.float32)
    with FlopCounterMode(display=False) as counter:
        ops.int8_attention(q, k, v, torch.zeros(2, dtype=torch.long))
    assert counter.get_total_flops() == ops.int8_attention_flops(700, 2, 4, 8, 8)


STATED = (0.011, 0.011, 0.047)  # of normal keys; of keys with an offset, smoothed; and as they are


def error(o: Tensor, exact: Tensor) -> float:
    return float((o - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def test_the_error_is_as_stated_and_smoothing_keeps_it_small():
    """What the docstring of policies/prefills/sage.py says."""
    q, k, v = lines(1, 1024, 1024, 2, 2, 64, torch.float32)
    offset, past = 20.0 * (torch.arange(64) % 8 == 0), torch.tensor([0])
    for keys, smooth, rough in ((k, STATED[0], STATED[0]), (k + offset, *STATED[1:])):
        exact = attention(q, keys, v, past)
        assert error(prefill_policy("sage").attend(q, keys, v, past, None, PLAIN), exact) == pytest.approx(
            smooth, rel=0.1
        )
        assert error(ops.int8_attention(q, keys, v, past), exact) == pytest.approx(rough, rel=0.1)
