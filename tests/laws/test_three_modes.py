"""Forward, prefill at any cut, and single steps are one function: the printed equation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slipstream as ss

from .conftest import B, T, build, close, run

CUTS = [(23,), (1, 22), (8, 8, 7), (5, 0, 11, 7), (1,) * 23]


def test_forward_is_the_printed_equation(mixer, x):
    close(mixer(x), mixer.reference(x))


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_prefill_at_any_cut_is_forward(mixer, x, cuts):
    y, state = run(mixer, x.split(cuts, 1), mixer.init_state(B, T))
    close(y, mixer(x))
    assert state.length.tolist() == [T] * B


@given(data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_prefill_at_random_cuts_from_a_state_without_room(data):
    mixer = build(ss.mixers()[data.draw(st.sampled_from(sorted(ss.mixers())))])
    points = sorted(data.draw(st.lists(st.integers(0, T), max_size=5)))
    x = torch.randn(B, T, mixer.config.d_model, dtype=torch.float64)
    cuts = [b - a for a, b in zip([0, *points], [*points, T])]
    close(run(mixer, x.split(cuts, 1), mixer.init_state(B))[0], mixer(x))


def test_steps_are_forward(mixer, x):
    state, ys = mixer.init_state(B, T), []
    for t in range(T):
        y, state = mixer.step(x[:, t : t + 1], state)
        ys.append(y)
    close(torch.cat(ys, 1), mixer(x))


def test_steps_after_a_prefill_are_forward(mixer, x):
    y, state = mixer.prefill(x[:, :14], mixer.init_state(B, T))
    ys = [y]
    for t in range(14, T):
        y, state = mixer.step(x[:, t : t + 1], state)
        ys.append(y)
    close(torch.cat(ys, 1), mixer(x))


def test_no_tokens_change_nothing(mixer, x):
    _, before = mixer.prefill(x, mixer.init_state(B, T))
    y, after = mixer.prefill(x[:, :0], before.clone())
    assert y.shape == (B, 0, mixer.config.d_model)
    for name in before.slots:
        assert torch.equal(after[name], before[name])


def test_chunk_size_changes_nothing(cls, x, mixer):
    if "chunk_size" not in cls.Config.model_fields:
        assert "chunk_size" not in mixer.config.model_dump()
        return
    for chunk_size in (2, 3, 16, 64):
        close(build(cls, chunk_size=chunk_size)(x), mixer(x))
