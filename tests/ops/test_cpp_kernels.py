"""Every C++ kernel against the torch form of its op: outputs, final states, all gradients, ragged and packed rows."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from slipstream.ops.backends.cpp.library import build, kernels
from slipstream.ops.dispatch import Call, chosen, torch_forms

B, T, D, N = 3, 137, 21, 5  # no chunk, strip or vector divides them
TOLERANCE = {torch.float64: 1e-10, torch.complex128: 1e-10, torch.float32: 2e-5, torch.complex64: 2e-5}
Arguments = dict[str, Any]


def selective(dtype: torch.dtype, draw: torch.Generator, **more: Any) -> Arguments:
    """dt from 0 to 2, so that some decays are nearly 0 and some nearly 1."""
    normal = {"x": (B, T, D), "B": (B, T, N), "C": (B, T, N), "state": (B, D, N)}
    lines = {n: torch.randn(*dims, dtype=dtype, generator=draw) for n, dims in normal.items()}
    dt, A = (torch.rand(*dims, dtype=dtype, generator=draw) for dims in ((B, T, D), (D, N)))
    return lines | {"dt": 2 * dt**3, "A": -8 * A} | more


def implicit(dtype: torch.dtype, draw: torch.Generator) -> Arguments:
    """Longhorn's: dt B^2 stays below 1."""
    lines = selective(dtype, draw)
    return lines | {"A": None, "B": lines["B"].clamp(-1, 1), "dt": lines["dt"].clamp(max=0.9)}


def linear(dtype: torch.dtype, draw: torch.Generator) -> Arguments:
    dims = {"decay": (B, T, 7, 11), "b": (B, T, 7, 11), "state": (B, 7, 11)}
    lines = {n: torch.randn(*d, dtype=dtype, generator=draw) for n, d in dims.items()}
    return lines | {"decay": 0.6 * lines["decay"]}


def conv(dtype: torch.dtype, draw: torch.Generator, taps: int, bias: bool) -> Arguments:
    dims = {"x": (B, T, D), "weight": (D, taps), "state": (B, taps - 1, D)} | ({"bias": (D,)} if bias else {})
    return {n: torch.randn(*d, dtype=dtype, generator=draw) for n, d in dims.items()}


def slstm(dtype: torch.dtype, draw: torch.Generator) -> Arguments:
    """Gates large enough that the past wins in some places and the token in others."""
    gates, U = (
        3 * torch.randn(B, T, 4, 3, N, dtype=dtype, generator=draw),
        torch.randn(4, 3, N, N, dtype=dtype, generator=draw),
    )
    h, c, n, m = (torch.randn(B, 3, N, dtype=dtype, generator=draw) for _ in range(4))
    return {"gates": gates, "U": 0.3 * U, "state": (h, c, 1 + n.abs(), m)}


def peephole(dtype: torch.dtype, draw: torch.Generator) -> Arguments:
    dims = {"u": (B, T, D), "a": (B, T, D), "v": (D,), "state": (B, D)}
    return {n: torch.randn(*d, dtype=dtype, generator=draw) for n, d in dims.items()}


def semilinear(dtype: torch.dtype, draw: torch.Generator, width: int, n_tanh: int) -> Arguments:
    """U small enough that the linear part does not grow."""
    dims = {"x": (B, T, width), "U": (width, width), "state": (B, width)}
    lines = {n: torch.randn(*d, dtype=dtype, generator=draw) for n, d in dims.items()}
    return lines | {"U": 0.4 * lines["U"] / width**0.5, "n_tanh": n_tanh}


def recurrent(dtype: torch.dtype, draw: torch.Generator, n_gates: int, width: int, n_states: int = 1) -> Arguments:
    """Weights as torch.nn has them: W, U, b, b'."""
    high = n_gates * width
    dims = [(B, T, D), (high, D), (high, width), (high,), (high,), *[(B, width)] * n_states]
    x, W, U, b, b2, *state = (torch.randn(*d, dtype=dtype, generator=draw) for d in dims)
    weights = [W / D**0.5, U / width**0.5, b, b2]
    return {"x": x, "weights": weights, "state": state[0] if n_states == 1 else tuple(state)}


def outer(
    dtype: torch.dtype, draw: torch.Generator, *decay: int, K: int = 17, V: int = 9, bonus: bool = False
) -> Arguments:
    """decay: the shape of log_decay; its values are both of tokens that keep all and of tokens that keep nothing."""
    dims = {"q": (B, T, 2, K), "k": (B, T, 2, K), "v": (B, T, 2, V), "state": (B, 2, K, V)}
    lines = {
        n: torch.randn(*d, dtype=dtype, generator=draw)
        for n, d in (dims | ({"bonus": (2, K)} if bonus else {})).items()
    }
    fade = -50 * torch.rand(decay, dtype=dtype, generator=draw) ** 8
    return lines | {"k": lines["k"] / K**0.5, "scale": 0.3} | ({"log_decay": fade} if decay else {})


def delta(dtype: torch.dtype, draw: torch.Generator, *decay: int, **sizes: int) -> Arguments:
    lines = outer(dtype, draw, *decay, **sizes)
    unit = torch.nn.functional.normalize(lines["k"], dim=-1)
    return lines | {"k": unit, "beta": 2 * torch.rand(B, T, 2, dtype=dtype, generator=draw)}


def low_rank(erase: str, decay: tuple[int, ...], dtype: torch.dtype, draw: torch.Generator) -> Arguments:
    lines = outer(dtype, draw, *decay)
    unit = torch.nn.functional.normalize(torch.randn(lines["k"].shape, dtype=dtype, generator=draw), dim=-1)
    rate = torch.rand(unit.shape, dtype=dtype, generator=draw)
    return lines | {"read": -unit, "write": rate * unit, "erase": erase}


CASES: dict[str, tuple[str, Callable[..., Arguments], tuple[torch.dtype, ...]]] = {
    "selective_scan": ("selective_scan", selective, (torch.float64, torch.float32)),
    "signed": ("selective_scan", lambda *a: selective(*a, signed=True), (torch.float64, torch.float32)),
    "implicit": ("selective_scan", implicit, (torch.float64, torch.float32)),
    "conv of 4": ("causal_conv", lambda *a: conv(*a, 4, True), (torch.float64, torch.float32)),
    "conv of 3": ("causal_conv", lambda *a: conv(*a, 3, False), (torch.float64, torch.float32)),
    "conv of 1": ("causal_conv", lambda *a: conv(*a, 1, False), (torch.float64,)),
    "slstm_scan": ("slstm_scan", slstm, (torch.float64, torch.float32)),
    "peephole_scan": ("peephole_scan", peephole, (torch.float64, torch.float32)),
    "semilinear_scan": ("semilinear_scan", lambda *a: semilinear(*a, D, 5), (torch.float64, torch.float32)),
    "wide semilinear": ("semilinear_scan", lambda *a: semilinear(*a, 150, 150), (torch.float64, torch.float32)),
    "rnn_scan": ("nonlinear_scan.rnn_scan", lambda *a: recurrent(*a, 1, 18), (torch.float64, torch.float32)),
    "lstm_scan": ("nonlinear_scan.lstm_scan", lambda *a: recurrent(*a, 4, 18, 2), (torch.float64, torch.float32)),
    "wide lstm": ("nonlinear_scan.lstm_scan", lambda *a: recurrent(*a, 4, 131, 2), (torch.float64,)),
    "gru_scan": ("nonlinear_scan.gru_scan", lambda *a: recurrent(*a, 3, 18), (torch.float64, torch.float32)),
    "wide gru": ("nonlinear_scan.gru_scan", lambda *a: recurrent(*a, 3, 131), (torch.float64,)),
    "linear_scan": ("linear_scan", linear, tuple(TOLERANCE)),
    "outer_scan": ("outer_scan", outer, (torch.float64, torch.float32)),
    "outer by head": ("outer_scan", lambda *a: outer(*a, B, T, 2), (torch.float64, torch.float32)),
    "outer, one constant a head": ("outer_scan", lambda *a: outer(*a, 2, K=32, V=64), (torch.float64, torch.float32)),
    "outer by channel": ("outer_scan", lambda *a: outer(*a, B, T, 2, 17), (torch.float64, torch.float32)),
    "outer, bonus": ("outer_scan", lambda *a: outer(*a, bonus=True), (torch.float64,)),
    "outer by head, bonus": ("outer_scan", lambda *a: outer(*a, B, T, 2, bonus=True), (torch.float64, torch.float32)),
    "outer by channel, bonus": (
        "outer_scan",
        lambda *a: outer(*a, B, T, 2, 17, bonus=True),
        (torch.float64, torch.float32),
    ),
    "delta_scan": ("delta_scan", delta, (torch.float64, torch.float32)),
    "delta by head": ("delta_scan", lambda *a: delta(*a, B, T, 2, K=64, V=33), (torch.float64, torch.float32)),
    "delta by channel": ("delta_scan", lambda *a: delta(*a, B, T, 2, 17), (torch.float64, torch.float32)),
} | {
    f"{how}, {name}": ("delta_scan.dplr_scan", partial(low_rank, how, decay), (torch.float64, torch.float32))
    for how in ("decayed", "undecayed")
    for name, decay in (("none", ()), ("by head", (B, T, 2)), ("by channel", (B, T, 2, 17)))
}
NO_GRADIENTS = {"dplr_scan"}  # where they are wanted the torch form runs
RUNS = [(name, dtype) for name, (_, _, dtypes) in CASES.items() for dtype in dtypes]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    missing = {name: built.problem for name in kernels() if (built := build(name)).path is None}
    if missing:
        pytest.fail(f"no kernel to test: {missing}")


def op(name: str) -> Callable[..., Any]:
    """By its name, or by its file's and its own."""
    home, _, own = name.rpartition(".")
    return getattr(importlib.import_module(f"slipstream.ops.{home or own}"), own)


def arguments(case: str, dtype: torch.dtype) -> Arguments:
    made = CASES[case][1](dtype, torch.Generator().manual_seed(0))
    return tree_map(lambda v: v.requires_grad_(has_gradients(case)) if isinstance(v, Tensor) else v, made)


def own_name(case: str) -> str:
    return CASES[case][0].rpartition(".")[2]


def has_gradients(case: str) -> bool:
    return own_name(case) not in NO_GRADIENTS


def plain(case: str, dtype: torch.dtype = torch.float64) -> Arguments:
    """The same without gradients."""
    return tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, arguments(case, dtype))


def tensors(of: Any) -> list[Tensor]:
    return [v for v in tree_leaves(of) if isinstance(v, Tensor)]


def outcome(case: str, given: Arguments, lengths: Tensor | None = None) -> list[Tensor]:
    """Outputs, final state, and, where the kernel has them, the gradients of a function that weighs all of them."""
    y, final = op(CASES[case][0])(**given, lengths=lengths)
    if lengths is not None:
        real = (torch.arange(T) < lengths[:, None]).reshape(B, T, *[1] * (y.ndim - 2))
        y = torch.where(real, y, 0)
    weights = torch.sin(torch.arange(y.numel())).view_as(y)
    loss = (y * weights).abs().square().sum() + sum(s.abs().square().sum() for s in tensors(final))
    return [y, *tensors(final), *(torch.autograd.grad(loss, tensors(given)) if has_gradients(case) else ())]


def agree(got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        size = b.abs().max() if b.numel() else 1.0
        torch.testing.assert_close(a / size, b / size, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_kernel_is_the_torch_form(case: str, dtype: torch.dtype):
    given = arguments(case, dtype)
    assert chosen(own_name(case), Call("cpu", dtype, has_gradients(case))) == "cpp"
    with torch_forms():
        want = outcome(case, given)
    agree(outcome(case, given), want, dtype)


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_ragged_rows_end_where_they_end_whatever_the_padding_holds(case: str, dtype: torch.dtype):
    given, lengths = arguments(case, dtype), torch.tensor([T, 0, 20])
    with torch_forms():
        want = outcome(case, given, lengths)
    agree(outcome(case, given, lengths), want, dtype)
    padding = torch.arange(T) >= lengths[:, None]
    spoilt = {
        n: v.detach().masked_fill(padding.reshape(B, T, *[1] * (v.ndim - 2)), math.nan)
        if isinstance(v, Tensor) and v.shape[:2] == (B, T)
        else v
        for n, v in given.items()
    }
    _, final = op(CASES[case][0])(**spoilt, lengths=lengths)
    assert all(s.isfinite().all() for s in tensors(final))


@pytest.mark.parametrize("case", CASES)
def test_any_cut_and_no_tokens(case: str):
    given = plain(case)
    whole, last = op(CASES[case][0])(**given)
    state, ys = given.pop("state"), []
    for start, end in ((0, 1), (1, 1), (1, 2), (2, 20), (20, T)):
        piece = {n: v[:, start:end] if isinstance(v, Tensor) and v.shape[:2] == (B, T) else v for n, v in given.items()}
        y, state = op(CASES[case][0])(**piece, state=state)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_packed_documents(case: str):
    given = plain(case)
    bounds = torch.tensor([0, 10, 11, T])
    lines = {n: v[:1] if isinstance(v, Tensor) and v.shape[:2] == (B, T) else v for n, v in given.items()}
    got = op(CASES[case][0])(**lines, cu_seqlens=bounds)
    with torch_forms():
        want = op(CASES[case][0])(**lines, cu_seqlens=bounds)
    for a, b in zip(tensors(got), tensors(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_nan_and_an_infinity_stay_what_they_are():
    given = plain("selective_scan", torch.float32)
    given["x"][0, 5, 3], given["x"][1, 5, 4] = math.nan, math.inf
    y, _ = op("selective_scan")(**given)
    assert y[0, 5:, 3].isnan().all() and y[0, :, :3].isfinite().all() and not y[1, 5, 4].isfinite()


def test_attention_sees_no_padding_and_leaves_gradients_to_torch():
    for name in ("full_attention", "window_attention"):
        assert [chosen(name, Call("cpu", torch.float32, grad)) for grad in (False, True)] == ["cpp", "torch"]
    draw, lengths = torch.Generator().manual_seed(0), torch.tensor([T, 20, 0])
    q, k, v = (torch.randn(B, T, 2, N, dtype=torch.float64, generator=draw) for _ in range(3))
    padding = (torch.arange(T) >= lengths[:, None])[:, :, None, None]
    want = op("attention.reference")(q, k, v)
    got = op("attention")(*(x.masked_fill(padding, math.nan) for x in (q, k, v)), lengths=lengths)
    torch.testing.assert_close(got.masked_fill(padding, 0), want.masked_fill(padding, 0), rtol=1e-10, atol=1e-10)


def test_every_kernel_is_tested_here_or_in_a_file_of_its_own():
    """A file of that name runs twice, on the torch form and on the kernel (conftest.py). A kernel of gradients is its op's."""
    names = {k.replace("_gradient", "_scan") for k in kernels()}
    here = [set(case[0].split(".")) & names for case in CASES.values()]
    assert all(here)
    for name in names.difference(*here):
        assert Path(__file__).with_name(f"test_{name}.py").exists(), name
