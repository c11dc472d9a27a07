"""The delta rule's relatives against flash-linear-attention's operators with the same weights: whole passes, decoding, states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import slipstream as ss
from slipstream.ops.attention import attention
from slipstream.ops.delta_attention import delta_values

STORED = {n: torch.from_numpy(a) for n, a in np.load(Path(__file__).with_name("delta_family.npz")).items()}
SETTINGS = {
    "comba": {"n_heads": 2, "head_dim": 4, "expand_v": 1.5},
    "gated_deltaproduct": {"n_heads": 2, "head_dim": 4, "expand_v": 1.5, "n_householder": 3},
    "forgetting_transformer": {"n_heads": 2, "n_kv_heads": 1},
    "path_attention": {"n_heads": 2, "n_kv_heads": 1, "w_rank": 3, "forget_gate": True, "chunk_size": 8},
    "mesanet": {"n_heads": 2, "head_dim": 4, "n_steps": 5},
}
every_mixer = pytest.mark.parametrize("name", SETTINGS)


def pair(name, **changes):
    """Our mixer with the stored weights, and what else is stored."""
    stored = {n.removeprefix(name + "/"): t for n, t in STORED.items() if n.startswith(name + "/")}
    results = {n: stored.pop(n) for n in list(stored) if n.startswith(("y", "state/"))}
    assert results["y"].std() > 0.1
    mixer = ss.mixer(name, d_model=16, **SETTINGS[name] | changes).eval()
    mixer.load_state_dict(stored)
    return mixer, results


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, rtol=10 * tol, atol=tol)


@every_mixer
def test_a_whole_pass_is_theirs(name):
    mixer, results = pair(name)
    with torch.no_grad():
        close(mixer(STORED["x"]), results["y"])


@every_mixer
def test_prefill_and_steps_end_where_theirs_does(name):
    mixer, results = pair(name)
    x, state = STORED["x"], mixer.init_state(2, 21)
    with torch.no_grad():
        y, state = mixer.prefill(x[:, :13], state)
        ys = [y]
        for t in range(13, x.shape[1]):
            y, state = mixer.step(x[:, t : t + 1], state)
            ys.append(y)
    close(torch.cat(ys, 1), results["y"])
    for slot, want in results.items():
        if slot.startswith("state/"):
            close(state[slot.removeprefix("state/")], want)


def test_mesanet_nears_the_exact_solution_and_their_decoding():
    """As near as the guard in the step lengths lets conjugate gradients come; theirs begin elsewhere."""
    mixer, results = pair("mesanet", n_steps=30)
    x = STORED["x"]
    with torch.no_grad():
        close(mixer(x), results["y_exact"], 1e-3)
        _, state = mixer.prefill(x[:, :-1], mixer.init_state(2))
        close(mixer.step(x[:, -1:], state)[0][:, 0], results["y_last"], 1e-3)


def test_attention_over_delta_values_is_deltaformers():
    q, k, v, beta, want = (STORED[f"deltaformer_op/{n}"] for n in ("q", "k", "v", "beta", "o"))
    none = torch.zeros(2, dtype=torch.long)
    u = delta_values(q, k, v, beta, k[:, :0], v[:, :0], none, scale=k.shape[-1] ** -0.5, chunk_size=8)
    close(attention(q, k, u), want)
