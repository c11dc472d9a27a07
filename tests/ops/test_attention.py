"""Attention with a bias of keys, in blocks, from caches, against its definition: outputs and all gradients."""

from __future__ import annotations

import pytest
import torch

from slipstream.ops import attention as ops

B, T, H, G, K, V = 2, 19, 4, 2, 6, 6


def inputs(tokens=T, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = {"q": (H, K), "k": (G, K), "v": (G, V), "key_bias": (H,)}
    return {n: torch.randn(B, tokens, *s, generator=g, dtype=dtype) for n, s in shapes.items()}


def results(f, args):
    leaves = {n: t.clone().requires_grad_() for n, t in args.items()}
    o = f(**leaves)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=o.dtype)
    return [o, *torch.autograd.grad(o, list(leaves.values()), weights)]


def close(got, want, tol=1e-10):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("block", [1, 4, 512])
def test_biased_blocks_are_the_definition(block, monkeypatch):
    monkeypatch.setattr(ops, "BLOCK", block)
    close(results(ops.attention, inputs()), results(ops.reference, inputs()))


def test_rows_go_on_from_caches_of_their_own_lengths():
    args, past = inputs(), torch.tensor([7, 12])
    want = ops.reference(**args)
    rows = torch.stack([torch.arange(p, p + 5) for p in past.tolist()])
    q = args.pop("q")[torch.arange(B)[:, None], rows]
    got = ops.attention(q, **args, past=past)
    close([got], [want[torch.arange(B)[:, None], rows]])


def test_a_bias_common_to_all_keys_changes_nothing():
    args = inputs()
    shifted = args | {"key_bias": args["key_bias"] + 3.0}
    close([ops.attention(**shifted)], [ops.attention(**args)])


def test_a_long_running_sum_keeps_its_last_differences():
    """1e6 and more: in float32 neighbours would differ by sixteenths."""
    args = inputs(dtype=torch.float32)
    bias = args.pop("key_bias").double()
    near, far = (ops.attention(**args, key_bias=bias + more) for more in (0.0, 1e7))
    close([far], [near], 1e-5)


def test_no_queries_give_no_outputs():
    args = inputs()
    assert ops.attention(args["q"][:, :0], args["k"], args["v"], key_bias=args["key_bias"]).shape == (B, 0, H, V)
