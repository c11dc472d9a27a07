"""The projection against its definition, on torch's product and on the kernel for few rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from slipstream.ops.linear import linear, reference

ROWS = [(1,), (1, 1), (2, 1), (3,), (2, 2), (5,), (3, 7)]
SIZES = [(1, 1), (257, 129), (130, 768), (9, 3001)]  # outputs, inputs: neither vectors nor blocks of rows divide them
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


class Products(TorchDispatchMode):
    """Counts what torch is asked to multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.asked += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.mv)
        return func(*args, **(kwargs or {}))


def drawn(rows, outputs, inputs, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    return (
        torch.randn(*dims, dtype=dtype, generator=draw) for dims in ((*rows, inputs), (outputs, inputs), (outputs,))
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_any_shape(rows, size, dtype):
    x, weight, bias = drawn(rows, *size, dtype)
    want = reference(x.double(), weight.double(), bias.double())
    for given, wanted in ((bias, want), (None, want - bias.double())):
        y = linear(x, weight, given)
        assert y.dtype == dtype and y.shape == (*rows, size[0])
        size_of = want.abs().max().item()
        torch.testing.assert_close(y.double(), wanted, rtol=0, atol=TOLERANCE[dtype] * size_of)


def test_rows_and_matrices_that_do_not_lie_together():
    x, weight, bias = drawn((4,), 130, 300)
    torch.testing.assert_close(linear(x[::2], weight), F.linear(x[::2], weight))
    torch.testing.assert_close(linear(x.mT.contiguous().mT, weight), F.linear(x, weight))
    torch.testing.assert_close(linear(x[:, ::2], weight[:, ::2], bias), F.linear(x[:, ::2], weight[:, ::2], bias))
    torch.testing.assert_close(linear(x[:1, :130], weight.mT[:130]), F.linear(x[:1, :130], weight.mT[:130]))


def test_no_rows_and_no_inputs():
    _, weight, bias = drawn((1,), 130, 300)
    assert linear(torch.zeros(0, 300).double(), weight).shape == (0, 130)
    assert linear(torch.zeros(2, 0, 300).double(), weight, bias).shape == (2, 0, 130)
    torch.testing.assert_close(linear(torch.zeros(1, 0).double(), weight[:, :0], bias), bias[None])


def test_gradients():
    x, weight, bias = (t.requires_grad_() for t in drawn((2, 1), 130, 300))
    got = torch.autograd.grad(linear(x, weight, bias).square().sum(), (x, weight, bias))
    want = torch.autograd.grad(F.linear(x, weight, bias).square().sum(), (x, weight, bias))
    torch.testing.assert_close(got, want)


def test_nan_and_infinity_stay():
    x, weight, _ = drawn((2,), 130, 300, torch.float32)
    x[0, 299] = torch.nan
    weight[5, 7] = torch.inf
    y = linear(x, weight)
    assert y[0].isnan().all() and not y[1, 5].isfinite() and y[1, 6:].isfinite().all()


def test_few_rows_of_a_large_matrix_are_the_kernels(request):
    by_torch = request.node.callspec.params["run_by"] == "torch"
    x, weight, bias = drawn((4,), 257, 129, torch.float32)
    with Products() as products:
        linear(x, weight, bias)
    assert products.asked == by_torch
    with Products() as products:
        linear(torch.cat([x, x]), weight, bias)
    assert products.asked == 1


def test_what_is_wrong_is_said_by_torch():
    x, weight, _ = drawn((1,), 257, 129)
    for wrong in (x[:, :5], x.float()):
        with pytest.raises((RuntimeError, TypeError)):  # its shapes are checked before, under pytest
            linear(wrong, weight)
