"""Training mixtures of experts: losses and biases that balance them, what is told of them, and warnings in words."""

from __future__ import annotations

import json

import pytest
import torch

from slipstream.core.auxiliary import Collector, Usage
from slipstream.core.errors import InputError
from slipstream.data.text import text_data
from slipstream.models.language_model import language_model
from slipstream.train.config import Recipe, TrainConfig
from slipstream.train.experts import PATIENCE, Watch, told
from slipstream.train.loop import Trainer
from slipstream.train.run import Note, train

TINY = {"tokens": 16 * 4 * 12, "batch_size": 4, "eval_tokens": 64, "lr": 1e-2}
BALANCED = "attention/moe(n_experts=4, gate=sigmoid, selection_bias=true, bias_rate=0.01)"


def tiny(pattern=BALANCED, wiring=None, **changes) -> Trainer:
    model = language_model(pattern, n_layers=2, d_model=16, **wiring or {})
    return Trainer(model, text_data(context=16), Recipe(**TINY | changes))


@pytest.mark.parametrize(
    "pattern", [BALANCED, "attention/threshold_moe(n_experts=4)", "attention/switch_moe(n_experts=4)"]
)
def test_a_restored_trainer_goes_on_bit_for_bit(pattern):
    whole, first, second = (tiny(pattern) for _ in range(3))
    straight = list(whole.run())
    for _ in range(5):
        first.advance()
    second.restore({n: t.clone() for n, t in first.tensors().items()}, first.step, first.seconds)
    rest = list(second.run())
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor), name
    assert [p.loss for p in rest] == [p.loss for p in straight[5:]]
    assert [p.experts for p in rest] == [p.experts for p in straight[5:]]


def test_biases_move_after_each_step_and_are_no_parameters():
    trainer = tiny()
    trainer.advance()
    for mixer in trainer.model.stack.mixers()[1::2]:
        assert mixer.selection_bias.any()
        assert all(b in (0, pytest.approx(0.01)) for b in mixer.selection_bias.abs().tolist())
    assert "selection_bias" not in {n.rpartition(".")[2] for n, _ in trainer.model.named_parameters()}


def entropies(pattern):
    trainer = tiny(pattern, tokens=16 * 16 * 50, batch_size=16)
    *_, last = trainer.run()
    return last.validation, [use["entropy"] for use in last.experts.values()]


def test_the_balance_loss_keeps_the_load_even():
    """Left alone, this one falls to two experts for all tokens."""
    validation, even = entropies("attention/moe(n_experts=8, balance_loss=0.05)")
    _, left = entropies("attention/moe(n_experts=8, balance_loss=0, z_loss=0)")
    assert validation < 5.0
    assert min(even) > 0.8 and max(left) < 0.5


def test_the_loss_that_is_told_is_of_the_text_alone():
    weighed, plain = tiny("attention/moe(balance_loss=10)"), tiny("attention/moe(balance_loss=0, z_loss=0)")
    assert weighed.advance().loss == plain.advance().loss
    assert weighed.advance().loss != plain.advance().loss


def test_load_entropy_and_drops_are_told_by_layer():
    trainer = tiny("attention/switch_moe(n_experts=4, capacity_factor=0.5, stretch=8), attention")
    point = trainer.advance()
    assert list(point.experts) == ["0.1"]
    use = point.experts["0.1"]
    assert len(use["load"]) == 4 and sum(use["load"]) == pytest.approx(1, abs=1e-3)
    assert 0 < use["entropy"] <= 1 and 0.4 < use["dropped"] < 1
    assert tiny("attention").advance().experts is None


def test_loads_are_told_a_hundred_times_at_most():
    points = list(tiny(tokens=16 * 4 * 130).run())
    assert 98 <= sum(p.experts is not None for p in points) <= 101
    assert points[-1].experts is not None


def test_metrics_of_a_run_hold_them_and_its_first_line_the_parameters_of_a_token(tmp_path):
    events = []
    settings = {"n_layers": 1, "d_model": 16, "context": 16, "batch_size": 4, "tokens": 16 * 4 * 3, "eval_tokens": 64}
    train(TrainConfig(arch="attention/moe", out=tmp_path, threads=1, **settings), events.append)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(len(line["experts"]["0.1"]["load"]) == 8 for line in lines)
    assert "warnings" not in lines[0]
    opening = next(e.text for e in events if isinstance(e, Note))
    model = language_model("attention/moe", n_layers=1, d_model=16)
    assert f"{model.n_parameters():,} parameters ({model.n_active_parameters():,} of them for one token)" in opening


def looked_at(loads, tokens=100):
    """Warnings of steps with these loads of one layer."""
    model = language_model("attention/moe", n_layers=1, d_model=16)
    watch, collector, said = Watch(), Collector(), []
    for load in loads:
        collector.usage = {model.stack.mixers()[1]: Usage(torch.tensor(load), tokens)}
        said.append(watch.look(model, collector))
    assert told(model, collector)
    return said


def test_a_collapse_is_told_once_in_words():
    even, bad = [25] * 8, [95, 15, 15, 15, 15, 15, 0, 30]
    said = looked_at([even] * 3 + [bad] * (PATIENCE + 20))
    assert [i for i, s in enumerate(said) if s] == [PATIENCE + 2]
    over, idle = said[PATIENCE + 2]
    assert "expert 0 of layer 0.1 takes 3.8 times its share (95% of the tokens)" in over
    assert "1 of 8 experts of layer 0.1 got nothing for 50 steps (6)" in idle and "raise balance_loss" in idle


def test_accidents_and_choices_of_most_experts_are_no_collapse():
    once = [*[[25] * 7 + [0]] * (PATIENCE - 1), [25] * 8] * 2
    assert not any(looked_at(once))
    assert not any(looked_at([[100] * 7 + [50]] * (PATIENCE + 5)))  # seven of eight are chosen by all


def test_a_run_prints_its_warnings(tmp_path):
    events = []
    settings = {"n_layers": 1, "d_model": 16, "context": 4, "batch_size": 1, "eval_tokens": 64, "threads": 1}
    arch = "attention/moe(n_experts=64, top_k=1, normalised=false, balance_loss=0)"
    train(TrainConfig(arch=arch, out=tmp_path, tokens=4 * (PATIENCE + 10), **settings), events.append)
    assert any(isinstance(e, Note) and e.text.startswith("warning: step") for e in events)


def test_experts_in_reversible_layers_are_refused_in_words():
    with pytest.raises(InputError, match="reversible=false, or another feed-forward"):
        tiny(wiring={"reversible": True}).advance()
    tiny("attention", wiring={"reversible": True}).advance()


def test_bfloat16_autocast_trains():
    points = list(tiny(precision="bfloat16").run())
    assert points[-1].validation < points[0].bits_per_byte
