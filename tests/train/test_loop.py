"""The loop: it learns, it is exact in its parts, and it goes on where it was."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch

from slipstream.core.errors import InputError
from slipstream.core.objective import bits_per_byte
from slipstream.data.text import text_data
from slipstream.models.language_model import LanguageModel, language_model
from slipstream.objectives.next_token import NextToken
from slipstream.train.config import Recipe
from slipstream.train.loop import Trainer

TINY = {"tokens": 16 * 4 * 12, "batch_size": 4, "eval_tokens": 64, "lr": 1e-2}


def tiny_model(vocab_size: int = 256) -> LanguageModel:
    return language_model("attention", n_layers=1, d_model=16, vocab_size=vocab_size)


def tiny(**changes) -> Trainer:
    return Trainer(tiny_model(), text_data(context=16), Recipe(**TINY | changes))


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_learns(optimizer):
    """From a uniform guess to better than single letters allow to guess in 40 steps."""
    trainer = tiny(optimizer=optimizer, tokens=16 * 16 * 40, batch_size=16)
    points = list(trainer.run())
    assert points[0].loss == pytest.approx(math.log(256), rel=0.05)
    assert points[-1].validation < 5.0 < points[0].bits_per_byte
    assert [p.step for p in points] == list(range(1, 41))
    assert points[-1].tokens == 16 * 16 * 40
    assert points[-1].done == 1.0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_restored_trainer_goes_on_bit_for_bit(optimizer):
    whole, first, second = (tiny(optimizer=optimizer) for _ in range(3))
    straight = list(whole.run())
    for _ in range(5):
        first.advance()
    kept = {n: t.clone() for n, t in first.tensors().items()}
    second.restore(kept, first.step, first.seconds)
    rest = list(second.run())
    assert torch.equal(weights(second), weights(whole))
    same = [{k: v for k, v in asdict(p).items() if k != "seconds"} for p in (*straight[5:], *rest)]
    assert same[: len(rest)] == same[len(rest) :]


def test_two_trainers_of_one_recipe_see_the_same_and_end_the_same():
    assert [p.loss for p in tiny().run()] == [p.loss for p in tiny().run()]
    assert next(tiny().run()).loss != next(tiny(seed=1).run()).loss


def test_accumulated_parts_give_the_gradient_of_the_whole():
    """In float64, where the order of a sum is all that differs."""
    losses, ends = [], []
    for parts in (1, 4):
        model = tiny_model().double()
        trainer = Trainer(model, text_data(context=16), Recipe(**TINY | {"grad_accumulation": parts}))
        losses.append([p.loss for p in trainer.run()])
        ends.append(weights(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-8)


def test_the_gradient_is_clipped_and_its_length_reported():
    trainer = tiny(grad_clip=1e-6, weight_decay=0.0, lr=1e-3)
    trainer.optimizers.step = lambda lr: None  # leave the gradients to look at
    point = trainer.advance()
    length = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm()
    assert point.grad_norm > 1e-3
    assert length.item() == pytest.approx(1e-6, rel=1e-2)


def test_weight_decay_spares_what_the_model_spares():
    trainer = tiny()
    decayed, spared = trainer.optimizers.parts["adamw"].param_groups
    assert decayed["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0.0
    assert all(p.ndim < 2 for p in spared["params"])
    assert {len(decayed["params"]), len(spared["params"])} == {len(g) for g in trainer.model.weight_decay_groups()}


def test_muon_gets_the_hidden_matrices_and_nothing_else():
    trainer = tiny(optimizer="muon")
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    muon = {names[id(p)] for p in trainer.optimizers.parts["muon"].param_groups[0]["params"]}
    assert muon
    assert all(n.startswith("stack.") and n.endswith("proj.weight") for n in muon)
    adamw = [p for g in trainer.optimizers.parts["adamw"].param_groups for p in g["params"]]
    assert len(adamw) + len(muon) == len(names)
    assert "embedding.weight" in {names[id(p)] for p in adamw}


def test_validation_is_the_mean_over_the_text():
    """Against a direct sum over the same sequences, for a tokenizer whose tokens have several bytes."""
    data = text_data(tokenizer="bpe:300", context=16)
    model = tiny_model(data.vocab_size)
    trainer = Trainer(model, data, Recipe(**TINY | {"eval_tokens": 160}))
    batches = list(data.validation(1, most=10))
    with torch.no_grad():
        logs = [model(b[:, :-1]).log_softmax(-1).gather(2, b[:, 1:, None]).sum().item() for b, _ in batches]
    n_bytes = sum(n for _, n in batches)
    assert n_bytes > 160  # more bytes than tokens
    assert trainer.evaluate() == pytest.approx(-sum(logs) / math.log(2) / n_bytes, rel=1e-5)


def test_validation_when_asked_and_always_at_the_end():
    assert [p.step for p in tiny(eval_every=5).run() if p.validation] == [5, 10, 12]
    seen = [p.step for p in tiny().run() if p.validation]
    assert seen[-1] == 12
    assert len(seen) == 10


def test_a_budget_of_time_ends_a_run():
    trainer = tiny(tokens=None, budget=0.3)
    points = list(trainer.run())
    assert math.isinf(trainer.total_steps)
    assert points[-1].seconds >= 0.3 > points[-2].seconds
    assert points[-1].validation is not None
    assert points[-1].lr < points[len(points) // 2].lr  # the schedule follows the clock


def test_nonsense_stops_the_run_in_words():
    trainer = tiny()
    trainer.advance()
    next(trainer.model.parameters()).data[0, 0] = float("nan")
    before = weights(trainer).clone()
    with pytest.raises(InputError, match=r"broke down at step 2: loss nan.* try --lr 0\.003"):
        while True:
            trainer.advance()
    assert torch.equal(weights(trainer).nan_to_num(), before.nan_to_num())
    assert trainer.step == 1


def test_next_token_loss_adds_up():
    model, objective = tiny_model(), NextToken()
    batch = text_data(context=16).batch(0, 6, 0)
    whole, parts = objective.loss(model, batch), [objective.loss(model, b) for b in batch.chunk(3)]
    assert whole.predictions == sum(p.predictions for p in parts) == 96
    assert whole.nats.item() == pytest.approx(sum(p.nats.item() for p in parts), rel=1e-5)
    assert bits_per_byte(math.log(2) * 10, 5) == pytest.approx(2.0)


def test_bfloat16_autocast_trains():
    points = list(tiny(precision="bfloat16").run())
    assert points[-1].validation < points[0].bits_per_byte
