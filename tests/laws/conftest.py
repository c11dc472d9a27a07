"""The laws run on every registered mixer at its tiny size, in float64 unless a law says otherwise."""

from __future__ import annotations

import pytest
import torch

import slipstream as ss

B, T = 3, 23  # no tiny chunk divides 23


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def build(cls, **changes):
    """A mixer with seeded weights; every parameter is moved off its symmetric start so that no term hides at zero."""
    torch.manual_seed(0)
    mixer = cls(cls.tiny.model_copy(update=changes)).double().eval()
    for p in mixer.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return mixer


@pytest.fixture(params=sorted(ss.mixers()))
def cls(request):
    return ss.mixers()[request.param]


@pytest.fixture
def mixer(cls):
    return build(cls)


@pytest.fixture
def x(mixer):
    return torch.randn(B, T, mixer.config.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def run(mixer, pieces, state):
    """Outputs of prefill over the pieces, end to end, and the last state."""
    ys = []
    for piece in pieces:
        y, state = mixer.prefill(piece, state)
        ys.append(y)
    return torch.cat(ys, 1), state
