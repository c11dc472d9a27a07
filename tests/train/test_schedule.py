"""The learning rate over a run."""

from __future__ import annotations

from itertools import pairwise

import pytest

from slipstream.core.errors import InputError
from slipstream.train.config import Recipe, TrainConfig
from slipstream.train.schedule import lr_share

POINTS = [i / 1000 for i in range(1001)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_it_rises_to_one_and_falls_to_nothing(schedule):
    recipe = Recipe(schedule=schedule, warmup=0.1, decay=0.3)
    shares = [lr_share(done, recipe) for done in POINTS]
    assert shares[0] == 0.0
    assert shares[50] == pytest.approx(0.5)
    assert max(shares) == pytest.approx(1.0)
    assert shares[-1] == pytest.approx(0.0, abs=1e-9)
    top = 100 if schedule == "cosine" else 700
    assert all(a <= b for a, b in pairwise(shares[:101]))
    assert all(a >= b for a, b in pairwise(shares[top:]))


def test_wsd_is_stable_between():
    recipe = Recipe(schedule="wsd", warmup=0.1, decay=0.3)
    assert {lr_share(done, recipe) for done in POINTS[100:700]} == {1.0}


def test_no_warmup_and_no_decay():
    assert lr_share(0.0, Recipe(warmup=0.0)) == 1.0
    assert lr_share(0.99, Recipe(schedule="wsd", warmup=0.0, decay=0.0)) == 1.0


def test_settings_are_read_as_people_write_them():
    config = TrainConfig(params="3M", tokens="500k", budget="5m", tokenizer="bpe:4096", lr="1e-3")
    assert (config.params, config.tokens, config.budget, config.lr) == (3_000_000, 500_000, 300.0, 1e-3)
    assert TrainConfig().most_tokens == 600_000
    assert (TrainConfig().highest_lr, TrainConfig(optimizer="muon").highest_lr) == (3e-3, 6e-3)
    assert TrainConfig(budget=60).most_tokens == float("inf")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimiser": "muon"}, "did you mean optimizer"),
        ({"schedule": "linear"}, "'cosine' or 'wsd'"),
        ({"tokenizer": "words"}, "write bytes, bpe:4096"),
        ({"tokens": "many"}, "write a number"),
        ({"batch_size": 6, "grad_accumulation": 4}, "does not divide into grad_accumulation 4 parts"),
        ({"lr": 0}, "greater than 0"),
    ],
)
def test_mistakes_are_told(settings, said):
    with pytest.raises(InputError, match=said):
        TrainConfig(**settings)
