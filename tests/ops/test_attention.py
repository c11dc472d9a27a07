"""Attention with a bias of keys, in blocks, from caches, against its definition: outputs and all gradients.

Without gradients it is a kernel's, which these tests also hold to the definition: ranges of keys that begin and end anywhere,
shared heads, every setting, more queries and keys than one block has, and what must not be read.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slipstream.ops import attention as ops
from slipstream.ops.softmax import PLAIN, Softmax

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


SINKS = torch.tensor([0.5, -3.0, 0.0, 2.0], dtype=torch.float64)
SETTINGS = {
    "plain": PLAIN,
    "scaled": Softmax(0.3),
    "capped": Softmax(cap=2.0),
    "sinks": Softmax(sinks=SINKS),
    "all": Softmax(0.3, 5.0, SINKS),
}


def line(tokens: int, heads: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Heads of a wider tensor: their numbers do not stand beside each other."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(B, tokens, heads + 1, width, generator=draw, dtype=dtype)[:, :, 1:]


def same(got: Tensor, want: Tensor):
    """In float64, or in what is left of it after float32."""
    tol = 1e-10 if got.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(got.double(), want, rtol=tol, atol=tol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("tokens", "k_width", "v_width"), [(2, 6, 6), (19, 17, 9), (150, 5, 70)])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_the_definition(name: str, tokens: int, k_width: int, v_width: int, dtype: torch.dtype):
    q, k, v = line(tokens, H, k_width, 0), line(tokens, G, k_width, 1), line(tokens, G, v_width, 2)
    narrow = [x.to(dtype) for x in (q, k, v)]
    for causal in (True, False):
        want = ops.reference(q, k, v, causal=causal, softmax=SETTINGS[name])
        same(ops.attention(*narrow, causal=causal, softmax=SETTINGS[name]), want)
    for window in (1, 5, 70):
        want = ops.reference(q, k, v, window, softmax=SETTINGS[name])
        before = [torch.cat([x.new_full((B, window - 1, *x.shape[2:]), 3.0), x], 1) for x in narrow[1:]]
        none = torch.zeros(B, dtype=torch.long)
        same(ops.window_attention(narrow[0], *before, none, window, SETTINGS[name]), want)


@pytest.mark.parametrize("name", SETTINGS)
def test_caches_hold_more_than_is_seen(name: str):
    """Rows stand at positions of their own; behind them the caches hold what must not count."""
    tokens, past, settings = 150, torch.tensor([0, 113]), SETTINGS[name]
    q, k, v = line(270, H, K, 0), line(270, G, K, 1), line(270, G, V, 2)
    rows = [slice(p, p + tokens) for p in past.tolist()]
    here = torch.stack([q[b, row] for b, row in enumerate(rows)])
    want = ops.reference(q, k, v, softmax=settings)
    got = ops.attention(here, k, v, past, softmax=settings)
    close(got, [want[b, row] for b, row in enumerate(rows)])
    want = ops.reference(q, k, v, 40, softmax=settings)
    pad = [torch.cat([x.new_zeros(B, 39, *x.shape[2:]), x], 1) for x in (k, v)]
    lines = [torch.stack([x[b, p : p + tokens + 39] for b, p in enumerate(past.tolist())]) for x in pad]
    got = ops.window_attention(here, *lines, past, 40, settings)
    close(got, [want[b, row] for b, row in enumerate(rows)])


def test_all_of_a_row_is_seen_and_nothing_of_an_empty_one():
    q, k, v = line(T, H, K, 0), line(T, G, K, 1), line(T, G, V, 2)
    lengths = torch.tensor([7, 0])
    want = ops.reference(q[:1, :7], k[:1, :7], v[:1, :7], causal=False)
    got = ops.attention(q, k, v, causal=False, lengths=lengths)
    close([got[:1, :7], got[1:]], [want, torch.zeros_like(got[1:])])
    close([ops.attention(q[:, :3], k, v, causal=False)], [ops.reference(q, k, v, causal=False)[:, :3]])


def test_large_logits_do_not_overflow():
    q, k, v = (50 * line(150, heads, K, seed, torch.float32) for seed, heads in enumerate((H, G, G)))
    for settings in SETTINGS.values():
        want = ops.reference(q.double(), k.double(), v.double(), softmax=settings)
        got = ops.attention(q, k, v, softmax=settings)
        assert (got - want).abs().max() < 1e-3 * want.abs().max()


def test_no_tokens_read_nothing():
    none, past = torch.zeros(B, 0, H, K), torch.zeros(B, dtype=torch.long)
    k, v = line(4, G, K, 1, torch.float32), line(4, G, V, 2, torch.float32)
    assert ops.attention(none, k, v, past).shape == ops.window_attention(none, k, v, past, 5).shape == (B, 0, H, V)


def test_sinks_alone_may_learn():
    q, k, v = line(T, H, K, 0), line(T, G, K, 1), line(T, G, V, 2)
    sinks, past = SINKS.clone().requires_grad_(), torch.zeros(B, dtype=torch.long)
    settings, before = Softmax(sinks=sinks), [torch.cat([torch.zeros_like(x[:, :4]), x], 1) for x in (k, v)]
    for o in (ops.attention(q, k, v, softmax=settings), ops.window_attention(q, *before, past, 5, settings)):
        assert torch.autograd.grad(o.sum(), sinks)[0].abs().min() > 0
