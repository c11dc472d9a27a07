"""Gradients are those of the printed equation, also through a state that is handed over; the future reaches no output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slipstream.core.mixer import Mixer
from slipstream.laws.subject import B, Law, Subject, T, close, expect, in_pieces, in_steps, learns, needs


def _gradients(f: Callable[[Tensor], Tensor], x: Tensor, mixer: Mixer) -> dict[str, Tensor | None]:
    weights = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    mixer.zero_grad()
    leaf = x.clone().requires_grad_()
    (f(leaf) * weights).sum().backward()
    learnt = {n: p.grad for n, p in mixer.named_parameters() if learns(mixer, n)}
    idle = [n for n, p in mixer.named_parameters() if n not in learnt and p.grad is not None]
    expect(not idle, f"{idle} get gradients, declared to get none")
    return {"x": leaf.grad} | {n: None if g is None else g.clone() for n, g in learnt.items()}


def _same(got: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> None:
    for name, expected in want.items():
        expect(got[name] is not None and expected is not None, f"{name} gets no gradient")
        close(got[name], expected)  # type: ignore[arg-type]


def gradients_are_the_equations(s: Subject) -> None:
    """Gradients of x and of every parameter are those of the printed equation."""
    _same(_gradients(s.mixer.forward, s.input(), s.mixer), _gradients(s.mixer.reference, s.input(), s.mixer))


@needs("prefill", "step")
def gradients_flow_through_the_state(s: Subject) -> None:
    """Gradients flow through a state that is handed over, to prefill and to steps."""
    want = _gradients(s.mixer.forward, s.input(), s.mixer)
    _same(
        _gradients(lambda x: in_pieces(s.mixer, x.split([9, 14], 1), s.mixer.init_state(B, T))[0], s.input(), s.mixer),
        want,
    )
    _same(_gradients(lambda x: in_steps(s.mixer, x, s.mixer.init_state(B, T))[0], s.input(), s.mixer), want)


@needs("prefill")
def the_future_reaches_no_output(s: Subject) -> None:
    """The future reaches no output."""
    for t in (1, 11, T - 1):
        x = s.input().requires_grad_()
        (grad,) = torch.autograd.grad(s.mixer(x)[:, :t].sum(), x)
        expect(
            bool(grad[:, t:].abs().max() <= 1e-12 * grad.abs().max()), f"tokens after {t} reach the first {t} outputs"
        )
        expect(bool(grad[:, t - 1].abs().max() > 0), "the probe is dead: a token does not reach its own output")


LAWS: list[Law] = [gradients_are_the_equations, gradients_flow_through_the_state, the_future_reaches_no_output]
