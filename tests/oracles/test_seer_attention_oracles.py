"""SeerAttention against a numpy form written from the paper and the authors' code (stored by make_seer_attention.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import slipstream as ss

SETTINGS = {"budget": (3, 0.0), "threshold": (29, 0.22), "both": (3, 0.25)}


def stored(name):
    arrays = np.load(Path(__file__).with_name("seer_attention.npz"))
    found = {n: torch.from_numpy(arrays[n]) for n in arrays}
    top_k, threshold = SETTINGS[name]
    sizes = {"d_model": 24, "n_heads": 4, "n_kv_heads": 2, "block_size": 5}
    mixer = ss.mixer("seer_attention", **sizes, top_k=top_k, threshold=threshold).double().eval()
    weights = {f"qkv.{n}_proj.weight": found[n] for n in "qkv"} | {"o_proj.weight": found["o"]}
    weights["attn_gate.attngate_linear_q.weight"] = found["gate_q"].flatten(1, 2)
    weights["attn_gate.attngate_linear_k.weight"] = found["gate_k"]
    mixer.load_state_dict(weights)
    return found["x"], found[f"y/{name}"], mixer


@pytest.mark.parametrize("name", SETTINGS)
def test_it_is_theirs_as_a_whole_at_cuts_and_step_by_step(name):
    x, want, mixer = stored(name)
    first, state = mixer.prefill(x[:, :13], mixer.init_state(len(x), x.shape[1]))
    second, state = mixer.prefill(x[:, 13:17], state)
    steps = []
    for t in range(17, x.shape[1]):
        y, state = mixer.step(x[:, t : t + 1], state)
        steps.append(y)
    for got in (mixer(x), mixer.reference(x), torch.cat([first, second, *steps], 1)):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_the_settings_choose_differently():
    ys = [stored(name)[1] for name in SETTINGS]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (ys[a] - ys[b]).abs().max() > 1e-2
