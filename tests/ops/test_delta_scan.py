"""delta_scan and dplr_scan against their own loops: outputs, states, all gradients; ragged, packed, extremes; cost."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from slipstream.core.errors import InputError
from slipstream.ops import delta_scan as ops
from slipstream.ops.chunks import SEGMENT
from slipstream.ops.dispatch import torch_forms

B, T, H, K, V = 2, 23, 3, 8, 6
DECAYS = {"none": None, "constant": (H,), "head": (B, T, H), "channel": (B, T, H, K)}
KINDS = {"none": "none", "constant": "head", "head": "head", "channel": "channel"}
FORMS = {  # scan, step, loop, flops
    "delta": (ops.delta_scan, ops.delta_step, ops.reference, ops.delta_flops),
    "erase decayed": (ops.dplr_scan, ops.dplr_step, ops.dplr_reference, ops.dplr_flops),
    "erase undecayed": (
        *(partial(f, erase="undecayed") for f in (ops.dplr_scan, ops.dplr_step, ops.dplr_reference)),
        ops.dplr_flops,
    ),
}

every_form = pytest.mark.parametrize("form", FORMS)
every_decay = pytest.mark.parametrize("decay", DECAYS)


def inputs(form, decay, dtype=torch.float64, tokens=T):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=dtype)

    args = {"q": draw(B, tokens, H, K), "k": F.normalize(draw(B, tokens, H, K), dim=-1), "v": draw(B, tokens, H, V)}
    args["state"] = draw(B, H, K, V)
    if form == "delta":
        args["beta"] = 2 * draw(B, tokens, H).sigmoid()
    else:
        args["read"] = -F.normalize(draw(B, tokens, H, K), dim=-1)
        args["write"] = -args["read"] * draw(B, tokens, H, K).sigmoid()
    if DECAYS[decay] is not None:
        args["log_decay"] = -3 * draw(*(tokens if n == T else n for n in DECAYS[decay])).sigmoid()
    return args


def close(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def results(op, args, **settings):
    """Output, final state, and the gradient of a fixed sum of both with respect to every input."""
    leaves = {n: t.clone().requires_grad_() for n, t in args.items()}
    o, S = op(**leaves, **settings)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g, dtype=t.dtype) for t in (o, S)]
    return [o, S, *torch.autograd.grad([o, S], list(leaves.values()), weights)]


@every_form
@every_decay
@pytest.mark.parametrize("chunk_size", [1, 4, 5, 16, 64])
def test_the_chunked_form_is_the_rule(form, decay, chunk_size):
    args, (scan, _, loop, _) = inputs(form, decay), FORMS[form]
    for got, want in zip(results(scan, args, scale=0.3, chunk_size=chunk_size), results(loop, args, scale=0.3)):
        close(got, want)


@every_form
@every_decay
def test_segments_join(form, decay):
    args, (scan, _, loop, _) = inputs(form, decay, tokens=2 * SEGMENT * 2 + 3), FORMS[form]
    for got, want in zip(results(scan, args, chunk_size=2), results(loop, args)):
        close(got, want)


def test_the_delta_rule_is_a_case_of_low_rank():
    args = inputs("delta", "channel")
    beta = args.pop("beta")[..., None]
    as_low_rank = args | {"v": beta * args["v"], "read": args["k"], "write": -beta * args["k"]}
    for got, want in zip(ops.dplr_scan(**as_low_rank), ops.delta_scan(**args, beta=beta[..., 0])):
        close(got, want)


@every_form
@every_decay
def test_one_token_is_a_step(form, decay):
    args, (scan, step, _, _) = inputs(form, decay, tokens=1), FORMS[form]
    args.setdefault("log_decay", None)
    for got, want in zip(step(**args | {"state": args["state"].clone()}, scale=0.3), scan(**args, scale=0.3)):
        close(got, want)


@every_form
@every_decay
@pytest.mark.parametrize("garbage", [1e4, torch.nan])
def test_padding_reaches_no_state_and_no_gradient(form, decay, garbage):
    args, lengths, (scan, _, loop, _) = inputs(form, decay), torch.tensor([T, 9]), FORMS[form]
    padded = {n: t.clone() for n, t in args.items()}
    for name, t in padded.items():
        if t.ndim > 1 and name != "state":
            t[1, 9:] = garbage
    leaves = {n: t.requires_grad_() for n, t in padded.items()}
    o, S = scan(**leaves, lengths=lengths, chunk_size=4)
    short = {n: t if t.ndim == 1 else t[1:] if n == "state" else t[1:, :9] for n, t in args.items()}
    want_o, want_S = loop(**short)
    close(o[1:, :9], want_o)
    close(S[1:], want_S)
    grads = torch.autograd.grad(o[1, :9].sum() + S.sum(), list(leaves.values()))
    assert all(g.isfinite().all() for g in grads)


@every_form
@every_decay
def test_packed_documents_are_as_alone(form, decay):
    args, loop = inputs(form, decay), FORMS[form][2]
    row = {n: t if t.ndim == 1 else t[:1] for n, t in args.items() if n != "state"}
    bounds = [0, 5, 5, 6, T]
    settings = {"erase": "undecayed"} if form == "erase undecayed" else {}
    public = ops.delta_scan if form == "delta" else ops.dplr_scan
    o, S = public(**row, cu_seqlens=torch.tensor(bounds), chunk_size=4, **settings)
    for i, (a, b) in enumerate(pairwise(bounds)):
        want_o, want_S = loop(**{n: t if t.ndim == 1 else t[:, a:b] for n, t in row.items()})
        close(o[:, a:b], want_o)
        close(S[i : i + 1], want_S)


@every_form
@every_decay
def test_no_tokens_leave_the_state(form, decay):
    args = inputs(form, decay, tokens=0)
    o, S = FORMS[form][0](**args)
    assert o.shape == (B, 0, H, V)
    assert torch.equal(S, args["state"])


@every_form
@pytest.mark.parametrize("decay", ["constant", "head", "channel"])
def test_the_fastest_decay_overflows_nowhere(form, decay):
    args, scan = inputs(form, decay, torch.float32, tokens=200), FORMS[form][0]
    args["log_decay"] = args["log_decay"] * 300
    if form != "delta":
        args["write"] = args["write"] * 0.5
    got = results(scan, args)
    assert all(t.isfinite().all() for t in got)
    wide = scan(**{n: t.double() for n, t in args.items()})
    close(got[0].double(), wide[0], 1e-4)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_float32_survives_keys_that_are_all_alike(beta):
    """Where a Neumann series of the same system would lose every digit: 64 nearly equal keys at full strength."""
    args = inputs("delta", "none", tokens=512)
    args["k"] = F.normalize(args["k"][:, :1] + 0.02 * args["k"], dim=-1)
    args["beta"] = torch.full_like(args["beta"], beta)
    want, _ = ops.reference(**args)
    got, _ = ops.delta_scan(**{n: t.float() for n, t in args.items()})
    assert (got - want).abs().max() < 1e-3 * want.abs().max()


@every_form
@every_decay
def test_half_precision_keeps_a_wide_state(form, decay):
    args, (scan, _, loop, _) = {n: t.bfloat16() for n, t in inputs(form, decay).items()}, FORMS[form]
    o, S = scan(**args, chunk_size=4)
    assert (o.dtype, S.dtype) == (torch.bfloat16, torch.float32)
    want, _ = loop(**{n: t.double() for n, t in args.items()})
    assert (o.double() - want).abs().max() < 1e-2 * want.abs().max()


@every_form
@every_decay
@pytest.mark.parametrize("tokens", [1, 23, 64, 65])
def test_flops_are_counted_right(form, decay, tokens):
    args, (scan, _, _, flops) = inputs(form, decay, tokens=tokens), FORMS[form]
    with torch_forms(), FlopCounterMode(display=False) as counter:
        scan(**args, chunk_size=16)
    assert flops(tokens, B, H, K, V, "prefill", KINDS[decay], 16) == counter.get_total_flops()


def test_an_unknown_erase_order_is_an_error():
    with pytest.raises(InputError, match="'decayed'"):
        ops.dplr_scan(**inputs("erase decayed", "head"), erase="before")
