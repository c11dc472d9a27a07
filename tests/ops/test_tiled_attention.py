"""FlashAttention's rule against the definition, outputs and gradients; and that no form of attention holds a T x T matrix."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slipstream.ops import attention as ops
from slipstream.ops.softmax import Softmax
from slipstream.ops.tiled_attention import reference_tiled

B, H = 2, 3
TILE = 64  # in what is measured


def lines(queries, keys, K=6, V=6, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    shapes = (queries, K), (keys, K), (keys, V)
    return [torch.randn(B, n, H, w, dtype=dtype, generator=draw).requires_grad_() for n, w in shapes]


def results(f, leaves):
    o = f(*leaves)
    seed = torch.randn(o.shape, dtype=o.dtype, generator=torch.Generator().manual_seed(1))
    return [o, *torch.autograd.grad(o, leaves, seed)]


def close(got, want, tol=1e-10):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("tile", [1, 4, 7, 64])
@pytest.mark.parametrize("causal", [True, False])
def test_tiles_are_the_definition_and_so_are_their_gradients(tile, causal):
    leaves = lines(19, 19, V=5)
    scaled = Softmax(scale=0.3)
    got = results(lambda q, k, v: reference_tiled(q, k, v, causal, 0.3, tile), leaves)
    close(got, results(lambda q, k, v: ops.reference(q, k, v, causal=causal, softmax=scaled), leaves))


def test_last_queries_are_the_last_rows():
    q, k, v = lines(19, 19)
    close([reference_tiled(q[:, 12:], k, v, tile=4)], [reference_tiled(q, k, v, tile=4)[:, 12:]])


def test_torchs_kernels_follow_the_rule():
    leaves = lines(70, 70, dtype=torch.float32)
    close(results(ops.attention, leaves), results(lambda *x: reference_tiled(*x, tile=16), leaves), 1e-5)


def test_large_logits_do_not_overflow():
    q, k, v = (x.detach() for x in lines(19, 19, dtype=torch.float32))
    leaves = [(100 * x).requires_grad_() for x in (q, k)] + [v.requires_grad_()]
    assert all(x.isfinite().all() for x in results(lambda *x: reference_tiled(*x, tile=4), leaves))


class Largest(TorchDispatchMode):
    """The most numbers in any tensor that is made, forward or backward."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.numbers = max(self.numbers, t.untyped_storage().nbytes() // t.element_size())
        return out


def largest(f, T):
    leaves = lines(T, T, V=4, dtype=torch.float32)
    with Largest() as seen:
        results(f, leaves)
    return seen.numbers


SINKS = torch.zeros(H)
FORMS = {
    "whole": ops.attention,
    "bidirectional": lambda *x: ops.attention(*x, causal=False),
    "from a cache": lambda *x: ops.attention(*x, past=torch.zeros(B, dtype=torch.long)),
    "capped": lambda *x: ops.attention(*x, softmax=Softmax(cap=2.0)),
    "with sinks": lambda *x: ops.attention(*x, softmax=Softmax(sinks=SINKS)),
    "biased": lambda q, k, v: ops.attention(q, k, v, key_bias=k[..., 0].detach()),
    "tiled": lambda *x: reference_tiled(*x, tile=TILE),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_largest_tensor_grows_with_length_and_not_with_its_square(form, monkeypatch):
    monkeypatch.setattr(ops, "BLOCK", TILE)
    short, long = (largest(FORMS[form], T) for T in (256, 1024))
    assert short > 256
    assert long <= 4 * short


def kept(f, T):
    """Bytes that are kept for the gradient."""
    storages: dict[int, int] = {}

    def keep(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    leaves = lines(T, T, V=4, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        o = f(*leaves)
    assert o.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("form", FORMS)
def test_what_is_kept_for_the_gradient_grows_with_length(form, monkeypatch):
    monkeypatch.setattr(ops, "BLOCK", TILE)
    short, long = (kept(FORMS[form], T) for T in (256, 1024))
    assert 0 < long <= 4.2 * short
