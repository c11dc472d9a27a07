"""The choice of the next token, against transformers and against its own distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from slipstream.core.errors import InputError
from slipstream.generate.config import Sampling
from slipstream.generate.sampling import draw, probabilities, uniform

LOGITS = 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NONE = torch.zeros(4, 50, dtype=torch.bool)
HF = {
    "temperature": hf.TemperatureLogitsWarper,
    "top_k": hf.TopKLogitsWarper,
    "top_p": hf.TopPLogitsWarper,
    "min_p": hf.MinPLogitsWarper,
}


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_k": 500},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"top_p": 1.0},
        {"min_p": 0.1},
        {"temperature": 1.4, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
        {"top_p": 1e-9},
    ],
)
def test_filters_are_those_of_transformers(settings):
    settings = {"temperature": 1.0} | settings
    want = LOGITS
    for name in ("temperature", "top_k", "top_p", "min_p"):
        if settings.get(name) not in (None, 1.0):
            want = HF[name](settings[name])(None, want)
    torch.testing.assert_close(probabilities(LOGITS, NONE, Sampling(**settings)), want.softmax(-1))


def test_repetition_penalty_is_that_of_transformers():
    history = torch.randint(50, (4, 7), generator=torch.Generator().manual_seed(1))
    want = hf.RepetitionPenaltyLogitsProcessor(1.3)(history, LOGITS).softmax(-1)
    seen = NONE.scatter(1, history, True)
    torch.testing.assert_close(probabilities(LOGITS, seen, Sampling(temperature=1.0, repetition_penalty=1.3)), want)


def test_temperature_zero_is_greedy():
    p = probabilities(LOGITS, NONE, Sampling(temperature=0, top_p=0.5))
    assert torch.equal(p.argmax(-1), LOGITS.argmax(-1))
    assert torch.equal(draw(p, [0, 1, 2, 3], [9] * 4), LOGITS.argmax(-1))


def test_draws_follow_the_distribution_and_never_take_what_is_left_out():
    p = probabilities(LOGITS[:1], NONE[:1], Sampling(temperature=1.0, top_k=6))
    n = 4000
    drawn = draw(p.expand(n, -1), [3] * n, list(range(n)))
    counts = torch.bincount(drawn, minlength=50) / n
    assert (counts[p[0] == 0] == 0).all()
    assert (counts - p[0]).abs().max() < 4 * (0.25 / n) ** 0.5


def test_random_numbers_are_a_function_of_seed_and_position():
    numbers = np.array([uniform(seed, t) for seed in range(30) for t in range(100)])
    assert uniform(3, 50) == uniform(3, 50)
    assert len(set(numbers)) == 3000
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert abs(numbers.mean() - 0.5) < 0.02
    pairs = numbers.reshape(30, 100)
    assert abs(np.corrcoef(pairs[:, :-1].ravel(), pairs[:, 1:].ravel())[0, 1]) < 0.06  # neighbouring positions
    assert abs(np.corrcoef(pairs[:-1].ravel(), pairs[1:].ravel())[0, 1]) < 0.06  # neighbouring seeds


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_p": 0}, {"top_k": 0}, {"min_p": 2}, {"repetition_penalty": 0}]
)
def test_settings_out_of_range(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        Sampling(**bad)
