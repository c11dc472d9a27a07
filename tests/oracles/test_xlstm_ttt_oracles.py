"""mLSTM, sLSTM and the networks trained while they read, against outside code with the same weights.

transformers' layer for mlstm; for the others the arrays that make_xlstm_ttt.py made with the packages named there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import xLSTMConfig
from transformers.models.xlstm.modeling_xlstm import xLSTMLayer

import slipstream as ss
from slipstream.ops.inner_sgd import momentum_coefficients

from . import make_xlstm_ttt

B, T = 2, 37


def agree(ours, theirs, tol=2e-5):
    scale = theirs.std().item()
    assert scale > 0.01  # the mechanism matters
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=tol, atol=tol)


def prefill_then_steps(mixer, x, n):
    """Outputs of a prefill of n tokens and single steps after it."""
    y, state = mixer.prefill(x[:, :n], mixer.init_state(len(x)))
    ys = [y]
    for t in range(n, x.shape[1]):
        y, state = mixer.step(x[:, t : t + 1], state)
        ys.append(y)
    return torch.cat(ys, 1)


RENAMED = {
    "q": "q_proj", "k": "k_proj", "v": "v_proj", "ogate_preact": "ogate_proj", "igate_preact": "igate_proj",
    "fgate_preact": "fgate_proj", "multihead_norm": "norm", "out_proj": "o_proj",
}  # fmt: skip


@pytest.fixture
def mlstm_pair():
    torch.manual_seed(0)
    config = xLSTMConfig(hidden_size=128, num_heads=2, num_hidden_layers=1, qk_dim_factor=0.5, chunk_size=8)
    theirs = xLSTMLayer(config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.add_((4.0 if "gate" in name else 0.3) * torch.randn_like(p) / (128**0.5 if p.ndim == 2 else 1))
    ours = ss.mixer("mlstm", d_model=128, n_heads=2, expand_k=0.5, conv_size=0).eval()
    weights = {f"{RENAMED[n.partition('.')[0]]}.{n.partition('.')[2]}": p for n, p in theirs.state_dict().items()}
    ours.load_state_dict(weights | {"norm.bias": torch.zeros(128)})
    return theirs, ours


@torch.no_grad()
def test_mlstm_is_theirs_whole_and_cached(mlstm_pair):
    theirs, ours = mlstm_pair
    x = torch.randn(B, T, 128, generator=torch.Generator().manual_seed(1))
    want, _ = theirs(x)
    agree(ours(x), want)
    y, state = theirs(x[:, :20])
    pieces = [y]
    for t in range(20, T):
        y, state = theirs(x[:, t : t + 1], state)
        pieces.append(y)
    agree(prefill_then_steps(ours, x, 20), torch.cat(pieces, 1))


def test_mlstm_has_their_gradients(mlstm_pair):
    theirs, ours = mlstm_pair
    x = torch.randn(B, T, 128, generator=torch.Generator().manual_seed(1))
    w = torch.randn(B, T, 128, generator=torch.Generator().manual_seed(2))
    (theirs(x)[0] * w).sum().backward()
    (ours(x) * w).sum().backward()
    mine = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        first, _, rest = name.partition(".")
        scale = p.grad.abs().max()
        got = mine[f"{RENAMED[first]}.{rest}"].grad
        torch.testing.assert_close(got / scale, p.grad / scale, rtol=1e-4, atol=1e-4, msg=name)


def stored(name):
    with np.load(Path(__file__).with_name("xlstm_ttt.npz")) as arrays:
        return {n.removeprefix(f"{name}/"): torch.from_numpy(arrays[n]) for n in arrays.files if n.startswith(name)}


@torch.no_grad()
def test_slstm_is_the_authors():
    arrays = stored("slstm")
    x, want = arrays.pop("x"), arrays.pop("y")
    ours = ss.mixer("slstm", d_model=8, n_heads=2)
    ours.load_state_dict(arrays)
    agree(ours(x), want)
    agree(prefill_then_steps(ours, x, 9), want)


SETTINGS = {
    "ttt_linear": {"mini_batch": make_xlstm_ttt.TTT_BATCH, "conv_size": 3},
    "ttt_mlp": {"mini_batch": make_xlstm_ttt.TTT_BATCH, "conv_size": 3, "expand": 1.5, "base_lr": 1.0},
    "titans": {"mini_batch": make_xlstm_ttt.TTT_BATCH, "conv_size": 3, "expand": 1.5, "base_lr": 1.0},
    "lact": {"mini_batch": make_xlstm_ttt.CHUNK, "window": make_xlstm_ttt.WINDOW, "n_fast_heads": 2, "expand": 1.5},
}


@pytest.mark.parametrize("name", list(SETTINGS))
@torch.no_grad()
def test_networks_that_learn_are_the_loops(name):
    arrays = stored(name)
    x, want = stored("x")["x"], arrays.pop("y")
    ours = ss.mixer(name, d_model=8, n_heads=2, **SETTINGS[name]).double()
    ours.load_state_dict(arrays)
    agree(ours(x), want, 1e-10)
    agree(prefill_then_steps(ours, x, 9), want, 1e-10)


def test_stored_loops_are_what_their_script_makes():
    made = make_xlstm_ttt.make_loops()
    with np.load(Path(__file__).with_name("xlstm_ttt.npz")) as arrays:
        for name, array in made.items():
            np.testing.assert_allclose(arrays[name], array, rtol=1e-11, atol=1e-12, err_msg=name)


def test_rates_of_titans_combine_as_in_fla():
    given = stored("rates")
    theta, alpha, eta = (given[n].squeeze(-1) for n in ("theta", "alpha", "eta"))
    on_M, on_Z, on_g, left, put = momentum_coefficients(theta, eta.log(), torch.log1p(-alpha))
    pairs = [(on_M, given["on_M"]), (on_Z, given["on_Z"]), (on_g, -given["on_g"])]
    pairs += [(left[..., -1], given["left"]), (put[..., -1, :], -given["put"])]
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # fla takes parts of it in float32
