"""Classic and linear recurrent nets against other people's code with the same weights, or golden loops from the papers.

torch.nn.RNN itself; stored arrays, made by make_linear_rnn.py beside this file, for the others.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import slipstream as ss
from slipstream.ops.linear_scan import linear_scan

from . import make_linear_rnn as maker

STORED = np.load(Path(__file__).with_name("linear_rnn.npz"))


def arrays_of(name):
    prefix = f"{name}/"
    return {n.removeprefix(prefix): torch.from_numpy(STORED[n]) for n in STORED.files if n.startswith(prefix)}


def agree(ours, theirs, tol):
    scale = theirs.std().item()
    assert scale > 0.1  # the mechanism matters
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=tol, atol=tol)


def whole_and_in_steps(mixer, x):
    """Outputs of forward, and of a prefill of 11 tokens with single steps after it."""
    y, state = mixer.prefill(x[:, :11], mixer.init_state(len(x)))
    ys = [y]
    for t in range(11, x.shape[1]):
        y, state = mixer.step(x[:, t : t + 1], state)
        ys.append(y)
    return mixer(x), torch.cat(ys, 1)


def with_weights(name, weights, **settings):
    """In the weights' precision."""
    ours = ss.mixer(name, d_model=maker.D, **settings).to(next(iter(weights.values())).dtype).eval()
    ours.load_state_dict(weights)
    return ours


def test_golden_arrays_are_what_their_script_makes():
    made = maker.golden()
    assert set(made) <= set(STORED.files)
    for key, array in made.items():
        np.testing.assert_allclose(STORED[key], array, rtol=1e-12, atol=1e-12)


GOLDEN = {
    "qrnn": {"d_hidden": maker.H, "conv_size": 3},
    "sru": {"highway_bias": 0.0},
    "lmu": {"d_hidden": maker.H, **maker.LMU},
    "hgrn": {"conv_size": 0},
}


@pytest.mark.parametrize("name", list(GOLDEN))
@torch.no_grad()
def test_mixers_are_the_golden_loops(name):
    weights = arrays_of(name)
    x, want = weights.pop("x"), weights.pop("y")
    for got in whole_and_in_steps(with_weights(name, weights, **GOLDEN[name]), x):
        agree(got, want, 1e-10)


@pytest.mark.parametrize(("name", "theirs"), [("mingru", "to_hidden_and_gate"), ("minlstm", "to_hidden_and_f_i_gate")])
@torch.no_grad()
def test_minimal_nets_are_the_packages(name, theirs):
    weights = arrays_of(name)
    x, want = weights.pop("x"), weights.pop("y")
    weights = {"net." + n.replace(theirs, "to_hidden_and_gates"): w for n, w in weights.items()}
    for got in whole_and_in_steps(with_weights(name, weights, expand=1.5, conv_size=0), x):
        agree(got, want, 1e-10)


@torch.no_grad()
def test_lru_is_the_packages_recurrence():
    weights = arrays_of("lru")
    x, want = weights.pop("x"), weights.pop("y")
    weights |= {"out1.bias": torch.zeros(maker.D), "out2.bias": torch.zeros(maker.D)}
    for got in whole_and_in_steps(with_weights("lru", weights, d_state=maker.H), x):
        agree(got, want, 2e-5)


def test_lru_starts_on_its_ring():
    """As many states in every part of the ring's area, at every angle, and inputs that keep their variance."""
    torch.manual_seed(0)
    lru = ss.mixer("lru", d_model=8, d_state=4000, r_min=0.5, r_max=0.9, max_phase=3.0)
    size, angle = torch.exp(-torch.exp(lru.nu_log)), torch.exp(lru.theta_log)
    assert 0.5 <= size.min() < 0.51 < 0.89 < size.max() <= 0.9
    for values, top in ((size**2 - 0.25, 0.56), (angle, 3.0)):
        evenly = torch.linspace(0, top, 9)[1:-1]
        torch.testing.assert_close(
            torch.quantile(values.detach(), torch.arange(1, 8) / 8), evenly, atol=0.03 * top, rtol=0
        )
    torch.testing.assert_close(torch.exp(lru.gamma_log) ** 2, 1 - size**2, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_gateloop_is_the_packages_operator():
    weights = arrays_of("gateloop")
    x, want = weights.pop("x"), weights.pop("y")
    for got in whole_and_in_steps(with_weights("gateloop", weights, d_inner=maker.H), x):
        agree(got, want, 1e-10)


@torch.no_grad()
def test_linear_scan_is_flas_hgrn():
    arrays = arrays_of("hgrn_op")
    h, last = linear_scan(arrays["g"].exp(), arrays["x"])
    agree(h, arrays["h"], 2e-6)
    agree(last, arrays["last"], 2e-6)


@torch.no_grad()
def test_sru_is_the_authors_package():
    weights = arrays_of("sru_package")
    x, want, last = (weights.pop(n) for n in ("x", "y", "c"))
    ours = with_weights("sru", weights, highway_bias=-0.5)
    for got in whole_and_in_steps(ours, x):
        agree(got, want, 2e-6)
    agree(ours.prefill(x, ours.init_state(len(x)))[1]["c"], last, 2e-6)


def test_sru_starts_as_the_authors_package():
    """A spread of one over the width for candidates, half of it for gates, and half of one for the peepholes."""
    torch.manual_seed(0)
    sru = ss.mixer("sru", d_model=200)
    W, W_f, W_r = sru.weight.unflatten(1, (200, 3)).unbind(2)
    for weight, variance in ((W, 1 / 200), (W_f, 0.5 / 200), (W_r, 0.5 / 200), (sru.weight_c, 0.5)):
        assert abs(weight.var().item() / variance - 1) < 0.15
    assert not sru.bias.any()


@torch.no_grad()
def test_rnn_is_torchs():
    torch.manual_seed(0)
    theirs = nn.RNN(maker.D, maker.D, batch_first=True).double()
    x = torch.randn(2, 30, maker.D, dtype=torch.float64)
    want, last = theirs(x)
    ours = with_weights("rnn", theirs.state_dict())
    for got in whole_and_in_steps(ours, x):
        agree(got, want, 1e-12)
    agree(ours.prefill(x, ours.init_state(2))[1]["h"], last[0], 1e-12)


def test_lmu_remembers_a_signal_for_theta_tokens():
    """Legendre polynomials of the memory give back what was written any share of theta tokens ago."""
    lmu, signal = ss.mixer("lmu", d_model=16, d_state=12, theta=100.0), torch.sin(torch.arange(400) / 15).double()
    m = torch.zeros(12, dtype=torch.float64)
    for u in signal:
        m = lmu.A @ m + lmu.B * u
    for share in (0.0, 0.25, 0.5, 1.0):
        read = np.polynomial.legendre.legval(2 * share - 1, m.numpy())
        assert abs(read - np.sin((399 - 100 * share + 0.5) / 15)) < 0.05
