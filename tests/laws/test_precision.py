"""Low precision stays near float64, and large inputs make no NaN, forward or backward."""

from __future__ import annotations

import pytest
import torch

from .conftest import B, T


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-4), (torch.bfloat16, 6e-2)], ids=str)
def test_low_precision_stays_near(mixer, x, dtype, tol):
    mixer = mixer.to(dtype).double()  # weights that both precisions can hold
    x = x.to(dtype)
    want = mixer(x.double())
    y, _ = mixer.to(dtype).prefill(x, mixer.init_state(B, T))
    assert y.dtype == dtype
    assert (y.double() - want).abs().max() < tol * want.abs().max().clamp(min=1)


@pytest.mark.parametrize("size", [50.0, 1e-4])
def test_no_nan_at_extreme_inputs(mixer, x, size):
    mixer = mixer.float()
    x = (x.float().sign() * size).requires_grad_()
    y, state = mixer.prefill(x, mixer.init_state(B, T))
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in mixer.parameters() if p.grad is not None)
    finite = [t for t in state.slots.values() if t.is_floating_point()]
    assert not any(t.isnan().any() for t in finite)
