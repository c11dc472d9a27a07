"""Low precision stays near float64, and extreme inputs make no NaN, forward or backward."""

from __future__ import annotations

import torch

from slipstream.laws.subject import Law, Subject, expect, learns, needs, read_whole


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
            f"gradient of {n}": p.grad for n, p in mixer.named_parameters() if learns(mixer, n)
        }
        for name, t in tensors.items():
            expect(t is not None and bool(t.isfinite().all()), f"{name} is not finite at |x| = {size}")
        for name, t in state.slots.items():
            expect(not bool(t.isnan().any()), f"slot {name} holds NaN at |x| = {size}")


@needs("prefill")
def no_nan_in_a_long_sequence(s: Subject) -> None:
    """No NaN in float32 over 16,384 tokens (1,024 where training is quadratic) with gates at both ends, forward and backward."""
    tokens = 1024 if s.mixer.train_order == "T^2" else 16384
    roomy = {"chunk_size": 64, "mini_batch": 64, "max_len": tokens}
    mixer = s.build(**{n: v for n, v in roomy.items() if n in s.cls.Config.model_fields}).float()
    draw = torch.Generator().manual_seed(1)
    x = (50 * torch.randn(1, tokens, s.cls.tiny.d_model, generator=draw).sign()).requires_grad_()
    y = mixer(x)
    y.square().mean().backward()
    expect(bool(y.isfinite().all()), "outputs are not finite")
    expect(x.grad is not None and bool(x.grad.isfinite().all()), "the gradient of x is not finite")
    for name, p in mixer.named_parameters():
        finite = p.grad is not None and bool(p.grad.isfinite().all())
        expect(finite or not learns(mixer, name), f"the gradient of {name} is not finite")


LAWS: list[Law] = [low_precision_stays_near, no_nan_at_extremes, no_nan_in_a_long_sequence]
