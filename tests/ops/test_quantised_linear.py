"""Matrices in few bits: how near they are, and their product on every path, the kernel's and torch's."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from slipstream.core.errors import InputError
from slipstream.ops.backends.cpp import library
from slipstream.ops.dispatch import Call, chosen
from slipstream.ops.quantised_linear import (
    LEVELS,
    dequantise,
    dequantise_rows,
    pack,
    packed_shapes,
    quantised_linear,
    reference,
)

FORMS = [(8, 32), (8, 64), (4, 32)]  # bits, group
SIZES = [(48, 64), (33, 70), (17, 31), (1, 5), (100, 200)]  # outputs, inputs: most divide into no tile and no group
ROWS = [(1,), (2, 3), (7, 1), (101,)]
ROUNDED = 1.5e-2  # of the largest output: what rounding activations to 8 bits may add
PATHS = {  # of the kernel: what the compiler is told, and what the CPU must have for it
    "VNNI of 512 bits": (["-mavx512f", "-mavx512bw", "-mavx512vnni", "-mavx2", "-mfma"], "avx512_vnni"),
    "VNNI of 256 bits": (["-mavx2", "-mfma", "-mf16c", "-mavxvnni"], "avx_vnni"),
    "AVX2": (["-mavx2", "-mfma", "-mf16c"], "avx2"),
    "portable": ([], ""),
}


def drawn(*dims: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*dims, generator=torch.Generator().manual_seed(seed))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Activations as the kernel has them, in float64."""
    groups = F.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    whole = torch.where(scales == 0, 0, groups / scales).round()
    return (whole.double() * scales.double()).flatten(-2)[..., : x.shape[-1]]


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize(("bits", "group", "most"), [(8, 32, 0.0055), (8, 64, 0.006), (4, 32, 0.076)])
def test_error_of_normal_weights(bits, group, most):
    weight = drawn(64, 512)
    near = dequantise(*pack(weight, bits, group), 64, 512)
    assert (near - weight).norm() / weight.norm() < most


def test_four_bits_are_nearer_than_equal_distances():
    groups = drawn(400, 32)
    scales = groups.abs().amax(-1, keepdim=True) / 7
    even = (groups / scales).round() * scales
    ours = dequantise(*pack(groups, 4), 400, 32)
    assert (ours - groups).norm() < 0.8 * (even - groups).norm()


@pytest.mark.parametrize(("bits", "group"), FORMS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_packed_sizes_and_rows(size, bits, group):
    codes, scales = pack(drawn(*size), bits, group)
    assert (tuple(codes.shape), tuple(scales.shape)) == packed_shapes(*size, bits, group)
    whole = dequantise(codes, scales, *size, torch.float64)
    assert whole.shape == size and whole.dtype == torch.float64
    index = torch.arange(6).view(2, 3) % size[0]
    assert torch.equal(dequantise_rows(codes, scales, index, size[1], torch.float64), whole[index])


def test_large_matrices_are_packed_in_parts_that_make_no_difference(monkeypatch):
    whole = pack(drawn(100, 64), 4)
    monkeypatch.setattr("slipstream.ops.quantised_linear.PIECE", 1)
    for a, b in zip(pack(drawn(100, 64), 4), whole, strict=True):
        assert torch.equal(a, b)


def test_zeros_stay_zeros_and_small_weights_stay_near():
    weight = drawn(32, 96)
    weight[3], weight[:, 32:64] = 0, 0
    weight[5] *= 1e-5
    for bits in (8, 4):
        near = dequantise(*pack(weight, bits), 32, 96)
        assert (near[weight == 0] == 0).all()
        assert (near[5] - weight[5]).norm() < 0.1 * weight[5].norm()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_weights_that_are_no_numbers_are_refused(value):
    weight = drawn(32, 32)
    weight[1, 2] = value
    for bits in (8, 4):
        with pytest.raises(InputError, match="cannot be quantised"):
            pack(weight, bits)


@pytest.mark.parametrize(("bits", "group"), FORMS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_product(rows, size, bits, group):
    (codes, scales), x, bias = pack(drawn(*size), bits, group), drawn(*rows, size[1], seed=1), drawn(size[0], seed=2)
    exact = F.linear(x.double(), dequantise(codes, scales, *size, torch.float64), bias.double())
    y = quantised_linear(x, codes, scales, size[0], bias)
    assert y.dtype == torch.float32 and y.shape == (*rows, size[0])
    assert off(y, exact) < ROUNDED
    assert off(quantised_linear(x, codes, scales, size[0]), exact - bias.double()) < ROUNDED


def test_definition():
    size, x = (33, 70), drawn(2, 70).double()
    for bits, group in FORMS:
        codes, scales = pack(drawn(*size, seed=1), bits, group)
        torch.testing.assert_close(
            quantised_linear(x, codes, scales, 33), reference(x, codes, scales, 33), rtol=1e-10, atol=1e-10
        )


def test_one_row_is_what_it_is_among_many():
    codes, scales = pack(drawn(100, 200), 8)
    x = drawn(23, 200, seed=1)
    whole = quantised_linear(x, codes, scales, 100)
    for n in (1, 2, 5):
        for first in (0, 8):
            part = quantised_linear(x[first : first + n], codes, scales, 100)
            torch.testing.assert_close(part, whole[first : first + n], rtol=1e-5, atol=1e-5)


def test_other_dtypes_and_gradients_in_x_are_torchs():
    codes, scales = pack(drawn(40, 70), 4)
    weight = dequantise(codes, scales, 40, 70)
    assert chosen("quantised_linear", Call("cpu", torch.float32, False)) == (
        "cpp" if library.find_compiler() else "torch"
    )
    assert chosen("quantised_linear", Call("cpu", torch.float32, True)) == "torch"
    low = drawn(3, 70).bfloat16()
    assert torch.equal(quantised_linear(low, codes, scales, 40), F.linear(low, weight.bfloat16()))
    x = drawn(3, 70).requires_grad_()
    got = torch.autograd.grad(quantised_linear(x, codes, scales, 40).square().sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(F.linear(x, weight).square().sum(), x))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_nan_and_an_infinity_are_no_numbers_afterwards(value):
    for bits in (8, 4):
        codes, scales = pack(drawn(40, 70), bits)
        x = drawn(9, 70, seed=1)
        x[4, 69] = value
        y = quantised_linear(x, codes, scales, 40)
        assert not y[4].isfinite().any() and y[:4].isfinite().all() and y[5:].isfinite().all()


def test_no_rows_and_rows_apart():
    codes, scales = pack(drawn(40, 70), 8)
    assert quantised_linear(torch.zeros(2, 0, 70), codes, scales, 40).shape == (2, 0, 40)
    x = drawn(6, 140)[::2, :70]
    assert torch.equal(quantised_linear(x, codes, scales, 40), quantised_linear(x.contiguous(), codes, scales, 40))


def test_sizes_of_activations():
    """All zeros, denormals, and numbers near the largest."""
    codes, scales = pack(drawn(40, 64), 8)
    for size in (0.0, 1e-42, 1e-30, 1e30):
        x = size * drawn(2, 64)
        want = F.linear(x.double(), dequantise(codes, scales, 40, 64, torch.float64))
        error = (quantised_linear(x, codes, scales, 40).double() - want).abs().max()
        assert error <= ROUNDED * want.abs().max() + 1e-36


def test_levels_are_those_of_the_kernel():
    source = (library.HERE / "quantised_linear.cpp").read_text()
    assert f"LEVELS[16] = {{{', '.join(map(str, LEVELS))}}}" in source


def runnable() -> list[str]:
    """Paths that this machine can compile and run; on one that is no x86, the portable path."""
    here = platform.machine() in ("x86_64", "AMD64")
    there = [
        name for name, (_, needed) in PATHS.items() if not needed or (here and f" {needed} " in library.cpu_features())
    ]
    return there if library.find_compiler() else []


def compiled(path: str, folder: Path) -> Callable[..., None]:
    """The kernel as compiled for a CPU that has this path and no better."""
    file = folder / f"{path}.so"
    flags = [*library.ALWAYS, *PATHS[path][0]]
    command = [str(library.find_compiler()), *flags, str(library.HERE / "quantised_linear.cpp"), "-o", str(file)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    forward = ctypes.CDLL(str(file)).forward_f32
    forward.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 5
    return forward


def test_every_path_of_the_kernel(tmp_path):
    paths = runnable()
    assert paths or not library.find_compiler()
    for path in paths:
        forward = compiled(path, tmp_path)
        for (bits, group), (outputs, inputs), n in product(FORMS, SIZES, (1, 2, 9, 601)):
            (codes, scales), bias = pack(drawn(outputs, inputs), bits, group), drawn(outputs, seed=2)
            x, y = drawn(n, inputs, seed=n), torch.full((n, outputs), torch.nan)
            pointers = [t.data_ptr() for t in (x, codes, scales, bias, y)]
            forward(*pointers, n, inputs, outputs, group, bits == 4)
            want = F.linear(rounded(x), dequantise(codes, scales, outputs, inputs, torch.float64), bias.double())
            close = (y.double() - want).abs() < 1e-5 * want.abs().max()
            assert close.float().mean() > 0.999, path
            assert off(y, want) < 2e-3, path  # a half that is rounded the other way
