"""A tape does again what was recorded, with other numbers; and says when it cannot."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from slipstream.ops.linear import linear
from slipstream.ops.rms_norm import rms_norm
from slipstream.ops.tape import record


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def redone(run, *varying: Tensor) -> int:
    """Runs the tape on other numbers, in which nothing of the old ones is left, and compares. The number of its calls."""
    first = run()
    result, tape = record(run, varying)
    assert not tape.refused
    torch.testing.assert_close(result, first, rtol=0, atol=0)
    for seed in (1, 2):
        draw = torch.Generator().manual_seed(seed)
        for t in varying:
            t.copy_(torch.randint(1, 9, t.shape, generator=draw))
        kept = [t.clone() for t in varying]
        tape.run()
        again, after = _cloned(result), [t.clone() for t in varying]
        for t, old in zip(varying, kept):
            t.copy_(old)
        torch.testing.assert_close(again, run(), rtol=0, atol=0)
        torch.testing.assert_close(after, list(varying), rtol=0, atol=0)
    return len(tape.calls)


def _cloned(result):
    return [_cloned(r) for r in result] if isinstance(result, (list, tuple)) else result.clone()


def test_functions_views_and_kernels():
    x, weight = torch.randn(1, 1, 256), torch.randn(128, 256)
    redone(lambda: [rms_norm(linear(x * 2, weight)[..., ::2].unflatten(-1, (8, 8)).transpose(2, 3).contiguous())], x)


def test_writing_in_place():
    cache, new, at = torch.zeros(2, 5, 3), torch.randn(2, 1, 3), torch.tensor([1, 2])

    def run():
        cache.index_put_((torch.arange(2)[:, None], at[:, None] % 5), new)
        return [cache.sum(1), at + 1]

    redone(run, cache, new, at)


def test_what_is_overwritten_is_made_again():
    x = torch.randn(3)

    def run():
        total = torch.zeros(3)
        total += x  # of the recording; again, it must begin at zero
        total.mul_(torch.exp(torch.ones(3)))
        return [total]

    redone(run, x)


def test_several_results_and_other_dtypes():
    x = torch.randn(4, 9)
    redone(lambda: [*x.topk(3), x.to(torch.bfloat16).float(), x.argsort(stable=True), x > 2], x)


def test_nothing_is_done_that_comes_of_weights_alone_or_is_not_read():
    x, weight = torch.randn(4), torch.randn(4)

    def run():
        unread = x.sin().cos()
        assert unread.shape == x.shape
        return [x * weight.exp().neg()]

    assert redone(run, x) == 1


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda x: [x * int(x[0])], "asks for numbers"),
        (lambda x: [x * 2] if bool(x[0] > 0) else [x], "asks for numbers"),
        (lambda x: [x * x.tolist()[0]], "tolist"),
        (lambda x: [torch.from_numpy(x.numpy() * 2)], "numpy"),
        (lambda x: [x[x > 0]], "as many numbers as it finds"),
        (lambda x: [x.nonzero()], "as many numbers as it finds"),
        (lambda x: [x + torch.rand(3)], "at random"),
    ],
)
def test_what_cannot_be_done_again_is_refused_and_was_right(run, why):
    x = torch.tensor([1.0, 2.0, 3.0])
    with torch.random.fork_rng():
        expected = run(x)
    result, tape = record(lambda: run(x), [x])
    assert why in tape.refused
    assert not tape.calls
    if "random" not in why:
        torch.testing.assert_close(result, expected)


def test_asking_what_a_weight_is_is_no_matter():
    x, weight = torch.randn(3), torch.tensor([2.0])
    assert redone(lambda: [x * int(weight[0]) + weight.tolist()[0]], x) == 2


def test_wants_no_gradients():
    with torch.enable_grad(), pytest.raises(AssertionError, match="no gradients"):
        record(lambda: [torch.ones(1)], [])


def test_recording_does_not_load_torchs_compiler():
    """Which takes seconds, and somebody waits for the first token."""
    program = """
import sys, torch
from slipstream.ops.tape import record
with torch.no_grad():
    x = torch.ones(2)
    record(lambda: [torch.nn.functional.embedding(x.long(), torch.ones(3, 4)) * x.sum()], [x])
print("torch._dynamo" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
