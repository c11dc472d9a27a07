"""State-space and recurrent mixers against outside code with the same weights.

transformers' mixers for mamba, mamba2, rg_lru (in float32: they compute parts of themselves in it); torch.nn for lstm
and gru; stored arrays, made by the scripts beside this file, for s4d and tcn.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache, Mamba2Config, MambaConfig, RecurrentGemmaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

import slipstream as ss

from . import make_s4d, make_tcn

HERE = Path(__file__).parent
B, T, D = 2, 37, 32


@pytest.fixture
def x():
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(1))


def shaken(module, size=0.3):
    """Every weight moved, so that each of them matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn_like(p))
    return module.eval()


def agree(ours, theirs, tol=2e-5):
    scale = theirs.std().item()
    assert scale > 0.1  # the mechanism matters
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=tol, atol=tol)


def prefill_then_steps(mixer, x, n):
    """Outputs of a prefill of n tokens and single steps after it."""
    y, state = mixer.prefill(x[:, :n], mixer.init_state(len(x)))
    ys = [y]
    for t in range(n, x.shape[1]):
        y, state = mixer.step(x[:, t : t + 1], state)
        ys.append(y)
    return torch.cat(ys, 1)


def with_weights_of(name, theirs, **settings):
    ours = ss.mixer(name, **settings).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours


def transformers_pair(name):
    """A mixer of transformers, its configuration, and ours with its weights."""
    shared = {"hidden_size": D, "conv_kernel": 4, "num_hidden_layers": 1}
    if name == "mamba":
        config = MambaConfig(**shared, state_size=8, expand=2, time_step_rank=3)
        theirs = shaken(MambaMixer(config, 0))
        return theirs, config, with_weights_of("mamba", theirs, d_model=D, d_state=8, dt_rank=3)
    config = Mamba2Config(**shared, state_size=8, expand=2, num_heads=8, head_dim=8, n_groups=2, chunk_size=16)
    theirs = shaken(Mamba2Mixer(config, 0))
    return theirs, config, with_weights_of("mamba2", theirs, d_model=D, d_state=8, n_heads=8, n_groups=2)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@torch.no_grad()
def test_mamba_is_theirs_whole_and_cached(name, x):
    theirs, config, ours = transformers_pair(name)
    want = theirs(x)
    agree(ours(x), want)
    cache = DynamicCache(config=config)
    pieces = [theirs(x[:, :20], cache_params=cache)]
    pieces += [theirs(x[:, t : t + 1], cache_params=cache) for t in range(20, T)]
    agree(torch.cat(pieces, 1), want)
    agree(prefill_then_steps(ours, x, 20), torch.cat(pieces, 1))


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_mamba_has_their_gradients(name, x):
    theirs, _, ours = transformers_pair(name)
    w = torch.randn(B, T, D, generator=torch.Generator().manual_seed(2))
    for module in (theirs, ours):
        (module(x) * w).sum().backward()
    want = dict(theirs.named_parameters())
    for n, p in ours.named_parameters():
        scale = want[n].grad.abs().max()
        torch.testing.assert_close(p.grad / scale, want[n].grad / scale, rtol=1e-4, atol=1e-4, msg=n)


@torch.no_grad()
def test_rg_lru_is_theirs_whole_and_cached(x):
    config = RecurrentGemmaConfig(hidden_size=D, lru_width=D, num_attention_heads=4, conv1d_width=4)
    theirs = RecurrentGemmaRecurrentBlock(config, 0)
    for p in theirs.rg_lru.parameters():
        nn.init.normal_(p)  # made without values
    ours = with_weights_of("rg_lru", shaken(theirs), d_model=D, n_heads=4)
    positions = torch.arange(T).expand(B, -1)
    want, _ = theirs(x, positions, None, use_cache=False)
    agree(ours(x), want)
    pieces = [theirs(x[:, :20], positions[:, :20], None)[0]]
    pieces += [theirs(x[:, t : t + 1], positions[:, t : t + 1], None)[0] for t in range(20, T)]
    agree(torch.cat(pieces, 1), want)
    agree(prefill_then_steps(ours, x, 20), want)


@pytest.mark.parametrize(("name", "cls"), [("lstm", nn.LSTM), ("gru", nn.GRU)])
@torch.no_grad()
def test_recurrent_networks_are_torchs(name, cls, x):
    theirs = shaken(cls(D, D, batch_first=True))
    ours = with_weights_of(name, theirs, d_model=D).double()
    x = x.double()
    want, last = theirs.double()(x)
    agree(ours(x), want, 1e-12)
    agree(prefill_then_steps(ours, x, 20), want, 1e-12)
    _, state = ours.prefill(x, ours.init_state(B))
    for slot, theirs_last in zip(("h", "c"), last if name == "lstm" else (last,)):
        agree(state[slot], theirs_last[0], 1e-12)


GOLDEN = {"s4d": (make_s4d, {"d_state": 8}), "tcn": (make_tcn, {"d_hidden": 5, "n_levels": 3})}


@pytest.mark.parametrize("name", list(GOLDEN))
def test_stored_arrays_are_what_their_script_makes(name):
    stored, made = np.load(HERE / f"{name}.npz"), GOLDEN[name][0].make()
    assert set(stored) == set(made)
    for key in made:
        np.testing.assert_allclose(stored[key], made[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", list(GOLDEN))
@torch.no_grad()
def test_mixers_are_the_stored_arrays(name):
    arrays = {n: torch.from_numpy(a) for n, a in np.load(HERE / f"{name}.npz").items()}
    x, want = arrays.pop("x"), arrays.pop("y")
    ours = ss.mixer(name, d_model=x.shape[-1], **GOLDEN[name][1]).double()
    ours.load_state_dict(arrays)
    agree(ours(x), want, 1e-11)
    agree(prefill_then_steps(ours, x, 17), want, 1e-11)


def test_s4d_starts_at_the_frequencies_of_the_paper():
    """S4D-Inv: the limit of the imaginary eigenvalues of HiPPO-LegS's normal part, near at N = 256; S4D-Lin: pi n."""
    N = 256
    n = np.arange(N)
    p = np.sqrt(n + 0.5)
    legs = -np.tril(2 * np.outer(p, p), -1) - np.diag(n + 1.0)
    imaginary = np.sort(np.linalg.eigvals(legs + np.outer(p, p)).imag)[::-1][:5]
    inv = ss.mixer("s4d", d_model=16, d_state=N, init="inv")
    np.testing.assert_allclose(inv.A_imag[0, :5].detach(), imaginary, rtol=0.05)
    lin = ss.mixer("s4d", d_model=16, d_state=N)
    np.testing.assert_allclose(lin.A_imag[3].detach(), np.pi * np.arange(N // 2), rtol=1e-6)
    for mixer in (inv, lin):
        dt = mixer.log_dt.exp()
        assert torch.allclose(mixer.log_A_real.exp(), torch.tensor(0.5))
        assert 0.001 <= dt.min() < dt.max() <= 0.1
