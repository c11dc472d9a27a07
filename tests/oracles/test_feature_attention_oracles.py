"""Feature-map and decay members of linear attention against outside code with the same weights.

transformers' layer for lightning_attention, a whole pass and cached decoding; stored arrays, made by the script beside
this file, for the others.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.minimax.configuration_minimax import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention

import slipstream as ss

from . import make_feature_attention as maker

STORED = np.load(Path(__file__).with_name("feature_attention.npz"))
D, T, PREFIX, B, N_LAYERS = 48, 37, 20, 2, 4
SETTINGS = {
    "hedgehog": {},
    "cosformer": {"reach": maker.REACH},
    "random_feature_attention": {"n_features": 32},
    "metala": {},
    "based": {"feature_dim": maker.FEATURE_DIM},
    "rebased": {"feature_dim": maker.FEATURE_DIM},
    "hgrn2": {},
}
IN_FLOAT32 = {"hgrn2": 1e-5}  # fla's operator computes in it


def prefill_then_steps(mixer, x, n):
    """Outputs of a prefill of n tokens and single steps after it, and the last state."""
    y, state = mixer.prefill(x[:, :n], mixer.init_state(len(x)))
    ys = [y]
    for t in range(n, x.shape[1]):
        y, state = mixer.step(x[:, t : t + 1], state)
        ys.append(y)
    return torch.cat(ys, 1), state


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_stored_arrays_are_met(name):
    stored = {n.partition("/")[2]: torch.from_numpy(STORED[n]) for n in STORED if n.startswith(name + "/")}
    x, y = stored.pop("x"), stored.pop("y")
    mixer = ss.mixer(name, d_model=x.shape[-1], n_heads=maker.H, **SETTINGS[name]).double()
    mixer.load_state_dict(stored)
    assert y.std() > 0.1  # the mechanism matters
    tol = IN_FLOAT32.get(name, 1e-9)
    torch.testing.assert_close(mixer(x), y, rtol=tol, atol=tol)
    torch.testing.assert_close(prefill_then_steps(mixer, x, 9)[0], y, rtol=tol, atol=tol)


def test_the_stored_arrays_are_what_their_maker_makes():
    made = maker.make(maker.IN_NUMPY)
    assert set(made) <= set(STORED)
    for name, array in made.items():
        np.testing.assert_allclose(array, STORED[name], rtol=1e-9, atol=1e-12)


def minimax_pair(layer):
    """One lightning layer of MiniMax, and ours with its weights: they have the same names."""
    torch.manual_seed(0)
    config = MiniMaxConfig(
        hidden_size=D, num_attention_heads=3, num_hidden_layers=N_LAYERS, block_size=16,
        layer_types=["linear_attention"] * N_LAYERS,
    )  # fmt: skip
    theirs = MiniMaxLightningAttention(config, layer).eval()
    for name, p in theirs.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.3)
    ours = ss.mixer("lightning_attention", d_model=D, n_heads=3, depth=layer / (N_LAYERS - 1 + 1e-5)).eval()
    ours.load_state_dict(dict(theirs.named_parameters()))
    return theirs, ours


@pytest.mark.parametrize("layer", [0, 1, N_LAYERS - 1])
@torch.no_grad()
def test_lightning_attention_is_minimax_whole_and_cached(layer):
    theirs, ours = minimax_pair(layer)
    x, cache = torch.randn(B, T, D), MiniMaxCache()
    want = theirs(x, None, None)[0]
    assert want.std() > 0.1
    torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-5)
    pieces = [theirs(x[:, :PREFIX], None, None, past_key_values=cache)[0]]
    pieces += [theirs(x[:, t : t + 1], None, None, past_key_values=cache)[0] for t in range(PREFIX, T)]
    got, state = prefill_then_steps(ours, x, PREFIX)
    torch.testing.assert_close(got, torch.cat(pieces, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["S"], cache.get_linear_cache(layer), rtol=1e-4, atol=1e-5)
