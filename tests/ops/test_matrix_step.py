"""One token of the matrix-state rules: the kernel against the torch form, in every kind of decay and layout."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from slipstream.ops.delta_scan import delta_step, dplr_step
from slipstream.ops.dispatch import torch_forms
from slipstream.ops.outer_scan import outer_step

B, H, K, V = 3, 4, 5, 19  # no vector divides them
DECAYS = {"none": None, "fixed": (H,), "head": (B, 1, H), "channel": (B, 1, H, K)}


def lines(dtype: torch.dtype, *widths: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(B, 1, H, w, dtype=dtype, generator=draw) for w in widths]


def decay(kind: str, dtype: torch.dtype) -> Tensor | None:
    dims = DECAYS[kind]
    return None if dims is None else -2 * torch.rand(dims, dtype=dtype, generator=torch.Generator().manual_seed(1)) ** 4


def agree(rule, dtype: torch.dtype, lines: list[Tensor], S: Tensor, *more) -> None:
    """The state goes in as a copy of the same layout: the kernel writes the next one over it."""
    with torch_forms():
        want = rule(*lines, S, *more)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for a, b in zip(rule(*lines, S.clone(), *more), want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", DECAYS)
def test_kernel_is_the_torch_form(kind: str, dtype: torch.dtype):
    q, k, v, a, b = lines(dtype, K, K, V, K, K)
    S, beta, bonus = torch.randn(B, H, K, V, dtype=dtype), torch.rand(B, 1, H, dtype=dtype), torch.randn(H, K).to(dtype)
    fade = decay(kind, dtype)
    agree(outer_step, dtype, [q, k, v, fade], S, 0.3)
    agree(outer_step, dtype, [q, k, v, fade], S, 0.3, bonus)
    agree(delta_step, dtype, [q, k, v, beta, fade], S, 0.3)
    for erase in ("decayed", "undecayed"):
        agree(dplr_step, dtype, [q, k, v, a, b, fade], S, 0.3, erase)


def test_heads_that_share_and_slices_of_wider_rows():
    q, k, _ = lines(torch.float64, K, K, V)
    wide = torch.randn(B, 1, H, 2 * V, dtype=torch.float64)
    S = torch.randn(B, H, K, V, dtype=torch.float64).mT.contiguous().mT  # columns first
    shared = [t[:, :, :1].expand(-1, -1, H, -1) for t in (q, k)]
    agree(outer_step, torch.float64, [*shared, wide[..., V:], decay("head", torch.float64)], S)


def test_a_wider_state_and_a_narrower_activation_keep_their_types():
    (q, k, v), S = lines(torch.float32, K, K, V), torch.randn(B, H, K, V, dtype=torch.float64)
    agree(outer_step, torch.float32, [q, k, v, None], S)


def test_a_state_large_enough_for_threads():
    q, k, v = (torch.randn(2, 1, 16, 128) for _ in range(3))
    S, beta, fade = torch.randn(2, 16, 128, 128), torch.rand(2, 1, 16), -torch.rand(16)
    agree(delta_step, torch.float32, [q, k / 12, v, beta, fade], S)


def test_nan_stays_in_its_head():
    q, k, v = lines(torch.float32, K, K, V)
    v[0, 0, 2, 3] = math.nan
    o, _ = outer_step(q, k, v, None, torch.randn(B, H, K, V))
    assert o[0, 0, 2, 3].isnan() and o.isnan().sum() == 1


def test_gradients_take_the_torch_form():
    q, k, v = lines(torch.float64, K, K, V)
    S = torch.randn(B, H, K, V, dtype=torch.float64, requires_grad=True)
    outer_step(q, k, v, None, S)[0].sum().backward()
    torch.testing.assert_close(S.grad, q[:, 0, :, :, None].expand_as(S))
