"""Low precision stays near float64, and extreme inputs make no NaN, forward or backward."""

from __future__ import annotations

import torch

from slipstream.laws.subject import Law, Subject, expect, read_whole


def low_precision_stays_near(s: Subject) -> None:
    """float32 stays within 1e-4 of float64, bfloat16 within 6e-2."""
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 6e-2)):
        mixer, x = s.build().to(dtype).double(), s.input().to(dtype)  # weights and inputs that both precisions can hold
        want = mixer(x.double())
        y, _ = read_whole(mixer.to(dtype), x)
        expect(y.dtype == dtype, f"{dtype} in, {y.dtype} out")
        error = ((y.double() - want).abs().max() / want.abs().max().clamp(min=1)).item()
        expect(error < tolerance, f"{dtype} is off by {error:.1e}")


def no_nan_at_extremes(s: Subject) -> None:
    """No NaN at |x| = 50 and |x| = 1e-4, in outputs, state or gradients."""
    mixer = s.build().float()
    for size in (50.0, 1e-4):
        x = (s.input().float().sign() * size).requires_grad_()
        y, state = read_whole(mixer, x)
        y.sum().backward()
        tensors = {"outputs": y, "gradient of x": x.grad} | {
            f"gradient of {n}": p.grad for n, p in mixer.named_parameters()
        }
        for name, t in tensors.items():
            expect(t is not None and bool(t.isfinite().all()), f"{name} is not finite at |x| = {size}")
        for name, t in state.slots.items():
            expect(not bool(t.isnan().any()), f"slot {name} holds NaN at |x| = {size}")


LAWS: list[Law] = [low_precision_stays_near, no_nan_at_extremes]
