"""State-space mixers and Hyena against stored arrays, made by the scripts beside this file, with the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import slipstream as ss
from slipstream.layers.hippo import hippo_modes, legs

from . import make_state_space

HERE = Path(__file__).parent
SETTINGS = {
    "dss": {"d_state": 4},
    "gss": {"d_state": 4, "expand": 2, "d_inner": 5},
    "h3": {"d_state": 8, "head_dim": 2, "conv_size": 5},
    "s4": {"d_state": 8},
    "mamba": {"d_state": 4, "conv_size": 3, "dt_rank": 2, "negative_eigenvalues": True},
    "longhorn": {"d_state": 4, "conv_size": 3, "dt_rank": 2},
    "mamba3": {"d_state": 6, "n_heads": 4, "n_groups": 2, "rope_fraction": 0.7},
    "hyena": {"order": 3, "filter_width": 5, "filter_depth": 1, "n_bands": 3, "horizon": 12},
}


def agree(ours, theirs, tol=1e-10):
    scale = theirs.std().item()
    assert scale > 0.1  # the mechanism matters
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=tol, atol=tol)


def prefill_then_steps(mixer, x, n):
    """Outputs of a prefill of n tokens and single steps after it."""
    y, state = mixer.prefill(x[:, :n], mixer.init_state(len(x), x.shape[1]))
    ys = [y]
    for t in range(n, x.shape[1]):
        y, state = mixer.step(x[:, t : t + 1], state)
        ys.append(y)
    return torch.cat(ys, 1)


def test_stored_arrays_are_what_their_script_makes():
    stored, made = np.load(HERE / "state_space.npz"), make_state_space.make()
    assert set(stored) == set(made)
    for key in made:
        np.testing.assert_allclose(stored[key], made[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", list(SETTINGS))
@torch.no_grad()
def test_mixers_are_the_stored_arrays(name):
    stored = np.load(HERE / "state_space.npz")
    arrays = {k.split("/")[1]: torch.from_numpy(stored[k]) for k in stored if k.startswith(name + "/")}
    x, want = arrays.pop("x"), arrays.pop("y")
    ours = ss.mixer(name, d_model=x.shape[-1], **SETTINGS[name]).double()
    ours.load_state_dict(arrays)
    agree(ours(x), want)
    agree(prefill_then_steps(ours, x, 17), want)


@torch.no_grad()
def test_s5_is_theirs():
    """Their state space, and the gate of the paper around it; they compute in float32."""
    arrays = {n: torch.from_numpy(a) for n, a in np.load(HERE / "s5.npz").items()}
    x, y, state = (arrays.pop(n) for n in ("x", "y", "state"))
    ours = ss.mixer("s5", d_model=x.shape[-1], d_state=8, n_blocks=1)
    ours.load_state_dict(arrays, strict=False)
    z = F.gelu(y)
    want = (z * torch.sigmoid(ours.gate_proj(z)))[None]
    agree(ours(x[None]), want, 1e-5)
    agree(prefill_then_steps(ours, x[None], 17), want, 1e-5)
    _, last = ours.prefill(x[None], ours.init_state(1))
    agree(torch.view_as_real(last["h"][0]), torch.view_as_real(state), 1e-5)


@pytest.mark.parametrize("N", [2, 8, 64])
def test_hippo_is_normal_plus_low_rank(N):
    A, _, B = legs(N)
    modes = hippo_modes(N)
    assert torch.all(modes.Lam.imag > 0)
    V = torch.cat([modes.V, modes.V.conj()], 1)
    Lam, low = (torch.cat([v, v.conj()]) for v in (modes.Lam, modes.P))
    diagonal_plus_low_rank = torch.diag(Lam) - torch.outer(low, low.conj())
    torch.testing.assert_close(V @ diagonal_plus_low_rank @ V.mH, A.to(V), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(V.mH @ B.to(V), torch.cat([modes.B, modes.B.conj()]), rtol=1e-10, atol=1e-10)


def test_s4_starts_as_legs_at_its_step_sizes():
    """The kernel at the start is that of HiPPO-LegS, C exp(t A) B dt, up to the bilinear rule's error."""
    torch.manual_seed(0)
    mixer = ss.mixer("s4", d_model=4, d_state=8, dt_min=1e-4, dt_max=1e-3).double()
    A, B, C = (v.detach() for v in mixer._system())
    legs_A, _, legs_B = legs(8)
    V = hippo_modes(8).V
    for d, dt in enumerate(mixer.log_dt.detach().exp()):
        C_legs = 2 * (torch.view_as_complex(mixer.C[d].detach()) @ V.mH).real
        h, want = B[d], torch.linalg.matrix_exp(0.5 * dt * legs_A) @ legs_B * dt
        scale = C_legs.norm() * want.norm()
        for _ in range(20):
            assert abs(C[d] @ h - C_legs @ want) < 1e-4 * scale
            h, want = A[d] @ h, torch.linalg.matrix_exp(dt * legs_A) @ want
