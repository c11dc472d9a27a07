"""selective_scan against its loop: outputs, final state and every gradient, whatever the chunk and the kind of decay;
and it stays small."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from slipstream.ops.dispatch import torch_forms
from slipstream.ops.selective_scan import reference, selective_scan, selective_scan_flops, selective_step

B, T, D, N = 3, 11, 5, 4


def close(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def draw(tokens=T, dtype=torch.float64):
    """x, dt, A, B, C, state."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, tokens, D), (B, tokens, D), (D, N), (B, tokens, N), (B, tokens, N), (B, D, N)]
    x, dt, A, B_, C, state = (torch.randn(s, dtype=dtype, generator=generator) for s in shapes)
    return [v.requires_grad_() for v in (x, dt.abs(), -A.abs(), B_, C, state)]


def without_A(arguments):
    """The implicit decay 1 - dt B^2, with steps that keep it positive."""
    x, dt, _, B_, C, state = (v.detach() for v in arguments)
    dt = dt.sigmoid() / (1 + B_.square().sum(-1, keepdim=True))
    return [v.requires_grad_() if v is not None else v for v in (x, dt, None, B_, C, state)]


KINDS = {"exponential": (list, {}), "signed": (list, {"signed": True}), "implicit": (without_A, {})}


def gradients(outputs, arguments):
    draw = torch.Generator().manual_seed(1)
    loss = sum((v * torch.randn(v.shape, dtype=v.dtype, generator=draw)).sum() for v in outputs)
    return torch.autograd.grad(loss, [v for v in arguments if v is not None])


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("chunk_size", [1, 2, 4, 11, 64])
def test_it_is_the_loop_with_all_gradients(chunk_size, kind):
    prepare, settings = KINDS[kind]
    arguments = prepare(draw())
    got = selective_scan(*arguments, chunk_size=chunk_size, **settings)
    want = reference(*arguments, **settings)
    for g, w in zip((*got, *gradients(got, arguments)), (*want, *gradients(want, arguments))):
        close(g, w)


def around(wide=torch.float64):
    """D and a gate that is a slice of wider rows, as a projection gives it."""
    generator = torch.Generator().manual_seed(2)
    skip, both = (torch.randn(s, dtype=wide, generator=generator) for s in ((D,), (B, T, 2 * D)))
    return {"softplus": True, "D": skip.requires_grad_(), "gate": both[..., D:].requires_grad_()}


@pytest.mark.parametrize("kind", list(KINDS))
def test_softplus_skip_and_gate_are_the_loops_with_and_without_gradients(kind):
    prepare, settings = KINDS[kind]
    (x, dt, *rest), given = prepare(draw()), around()
    dt = (dt.detach() - 2).requires_grad_()  # softplus has both its branches
    both = [v.detach() for v in (torch.cat([x, x], -1), torch.cat([rest[1], rest[2]], -1))]
    got, want = (
        selective_scan(x, dt, *rest, chunk_size=4, **given, **settings),
        reference(x, dt, *rest, **given, **settings),
    )
    every = [x, dt, *rest, given["D"], given["gate"]]
    for g, w in zip((*got, *gradients(got, every)), (*want, *gradients(want, every))):
        close(g, w)
    with torch.no_grad():
        sliced = (both[0][..., :D], dt, rest[0], both[1][..., :N], both[1][..., N:], rest[3])
        for g, w in zip(selective_scan(*sliced, **given, **settings), want):
            close(g, w)


def test_padding_spoils_nothing_of_softplus_skip_and_gate():
    arguments, given, lengths = draw(), around(), torch.tensor([T, 0, 4])
    x, dt, A, B_, C, state = arguments
    padding = (torch.arange(T) >= lengths[:, None])[..., None]
    spoiled = [v.detach().masked_fill(padding, torch.nan).requires_grad_() for v in (x, dt, B_, C, given["gate"])]
    clean = [v.detach().masked_fill(padding, 0).requires_grad_() for v in (x, dt, B_, C, given["gate"])]
    outs = []
    for x, dt, B_, C, gate in (spoiled, clean):
        y, final = selective_scan(x, dt, A, B_, C, state, lengths, **given | {"gate": gate})
        loss = torch.where(padding, 0, y).sum() + final.sum()
        outs.append([final, *torch.autograd.grad(loss, [x, dt, A, B_, C, state, given["D"], gate])])
        with torch.no_grad():
            outs[-1].append(selective_scan(x, dt, A, B_, C, state, lengths, **given | {"gate": gate})[1])
    for g, w in zip(*outs):
        close(g, w)


@pytest.mark.parametrize("kind", ["exponential", "implicit"])
def test_one_channel_over_many_chunks(kind):
    """Rates of one channel must not be taken for rates of one token."""
    x, dt, A, B_, C, state = KINDS[kind][0](draw())
    one = [x[..., :1], dt[..., :1], None if A is None else A[:1], B_, C, state[:, :1]]
    for g, w in zip(selective_scan(*one, chunk_size=4), reference(*one)):
        close(g, w)


def test_signed_decays_reach_from_one_to_minus_one():
    x, dt, A, B_, C, _ = draw(1)
    state = torch.ones(B, D, N, dtype=torch.float64)
    for size, kept in ((0.0, 1.0), (1e3, -1.0)):
        _, final = selective_scan(0 * x, size + 0 * dt, A - 1, B_, C, state, signed=True)
        close(final, torch.full_like(final, kept))


def test_gradients_pass_finite_differences_with_ragged_rows():
    lengths = torch.tensor([0, 4, 3])
    assert torch.autograd.gradcheck(lambda *v: selective_scan(*v, lengths=lengths, chunk_size=3), draw(4))


def test_a_state_without_a_later_use_has_a_gradient_too():
    arguments = draw()
    y, _ = selective_scan(*arguments, chunk_size=4)
    got = torch.autograd.grad(y.square().sum(), arguments)
    want = torch.autograd.grad(reference(*arguments)[0].square().sum(), arguments)
    for g, w in zip(got, want):
        close(g, w)


def test_padding_reaches_nothing_and_spoils_no_gradient():
    clean, lengths = draw(), [0, T, 4]
    x, dt, A, B_, C, state = (v.detach().clone() for v in clean)
    for row, n in enumerate(lengths):
        for v in (x, dt, B_, C):
            v[row, n:] = torch.nan
    spoiled = [v.requires_grad_() for v in (x, dt, A, B_, C, state)]
    y, final = selective_scan(*spoiled, lengths=torch.tensor(lengths), chunk_size=4)
    loss = torch.zeros((), dtype=torch.float64)
    for row, n in enumerate(lengths):
        rows = [v[row : row + 1, :n] if v.ndim == 3 and v is not clean[5] else v for v in clean[:5]]
        alone, last = reference(*rows, clean[5][row : row + 1])
        close(y[row : row + 1, :n], alone)
        close(final[row : row + 1], last)
        loss = loss + y[row, :n].sum()
    for g in torch.autograd.grad(loss + final.sum(), spoiled):
        assert g.isfinite().all()


@pytest.mark.parametrize("kind", list(KINDS))
def test_steps_are_the_loop_with_all_gradients(kind):
    prepare, settings = KINDS[kind]
    arguments = prepare(draw())
    x, dt, A, B_, C, state = arguments
    ys = []
    for t in range(T):
        y, state = selective_step(x[:, t], dt[:, t], A, B_[:, t], C[:, t], state, **settings)
        ys.append(y)
    got, want = (torch.stack(ys, 1), state), reference(*arguments, **settings)
    for g, w in zip((*got, *gradients(got, arguments)), (*want, *gradients(want, arguments))):
        close(g, w)


def test_packed_documents_are_as_alone():
    x, dt, A, B_, C, _ = (v.detach() for v in draw())
    x, dt, B_, C = (v.flatten(0, 1)[None] for v in (x, dt, B_, C))
    bounds = [0, 5, 5, 18, B * T]
    y, final = selective_scan(x, dt, A, B_, C, cu_seqlens=torch.tensor(bounds))
    alone = [selective_scan(x[:, i:j], dt[:, i:j], A, B_[:, i:j], C[:, i:j]) for i, j in pairwise(bounds)]
    close(y, torch.cat([o for o, _ in alone], 1))
    close(final, torch.cat([s for _, s in alone]))


def test_no_tokens_leave_the_state():
    *inputs, state = draw(0)
    y, final = selective_scan(*inputs, state)
    assert y.shape == (B, 0, D)
    assert torch.equal(final, state)


class Largest(TorchDispatchMode):
    """The most numbers any tensor made inside has held."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.most = max(self.most, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_the_state_of_every_token_is_never_kept():
    arguments = draw(256)
    with Largest() as largest:
        y, _ = selective_scan(*arguments, chunk_size=8)
        torch.autograd.grad(y.sum(), arguments)
    assert largest.most <= max(8 * B * D * N, 256 * B * D)


def test_low_precision_keeps_a_wide_state():
    arguments = [v.detach().bfloat16() for v in draw(100)]
    y, final = selective_scan(*arguments)
    want, last = reference(*(v.double() for v in arguments))
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    close(final.double(), last, 1e-4)
    close(y.double(), want, 2e-2)


def test_nothing_overflows_at_large_inputs():
    x, dt, A, B_, C, state = draw(4000, torch.float32)
    y, final = selective_scan(50 * x, 50 * dt, 50 * A, 50 * B_, 50 * C, state)
    assert y.isfinite().all()
    assert final.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), [x, dt, A, B_, C, state]))


def test_flops_are_those_torch_counts():
    with torch_forms(), FlopCounterMode(display=False) as counter:
        selective_scan(*draw())
    assert counter.get_total_flops() == selective_scan_flops(B * T, D, N)
