"""Training parts that only choose: they learn by losses of their own, beside the text and without a hand in it."""

from __future__ import annotations

import json

import pytest
import torch

from slipstream.data.text import text_data
from slipstream.models.language_model import language_model
from slipstream.train.config import Recipe, TrainConfig
from slipstream.train.loop import Trainer
from slipstream.train.run import train

TINY = {"tokens": 16 * 4 * 12, "batch_size": 4, "eval_tokens": 64, "lr": 1e-2}
DSA = "dsa(top_k=4, index_n_heads=2, index_head_dim=4, index_loss={})"
CSA = "csa(top_k=2, rate=2, window=4, index_n_heads=2, index_head_dim=4, index_loss={})"
SEER = "seer_attention(top_k=2, block_size=4, gate_loss={})"
each = pytest.mark.parametrize(("pattern", "part"), [(DSA, "indexer"), (CSA, "indexer"), (SEER, "attn_gate")])


def tiny(pattern: str, weight: float = 1.0, wiring=None, **changes) -> Trainer:
    model = language_model(pattern.format(weight), n_layers=2, d_model=16, **wiring or {})
    return Trainer(model, text_data(context=16), Recipe(**TINY | changes))


@each
def test_a_run_teaches_what_only_chooses_and_tells_the_loss(pattern, part):
    trainer = tiny(pattern)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if f".{part}." in n}
    first, *_, last = trainer.run()
    for name, parameter in trainer.model.named_parameters():
        if name in before:
            assert not torch.equal(parameter, before[name]), name
    assert list(first.lessons) == list(last.lessons) == ["0.0", "1.0"]
    assert all(loss > 0 for loss in last.lessons.values())
    assert tiny("attention").advance().lessons is None


@each
def test_without_weight_it_stays_as_it_began(pattern, part):
    trainer = tiny(pattern, 0.0)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if f".{part}." in n}
    assert trainer.advance().lessons is None
    assert before and all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)


@each
def test_the_first_step_of_all_else_is_the_same_with_and_without(pattern, part):
    """Neither the gradients nor their being cut to a length mix: even a lesson of huge weight moves nothing else."""
    taught, left = tiny(pattern, 1e6), tiny(pattern, 0.0)
    points = [t.advance() for t in (taught, left)]
    assert points[0].loss == points[1].loss and points[0].grad_norm > 10 * points[1].grad_norm
    others = dict(left.model.named_parameters())
    same = {n: torch.equal(p, others[n]) for n, p in taught.model.named_parameters()}
    assert {n for n, equal in same.items() if not equal} <= {n for n in same if f".{part}." in n}


@each
def test_parts_of_a_batch_and_bfloat16_and_reversible_layers_teach_too(pattern, part):
    whole, parts = tiny(pattern).advance(), tiny(pattern, grad_accumulation=2).advance()
    assert list(whole.lessons.values()) == pytest.approx(list(parts.lessons.values()), rel=1e-4)
    assert tiny(pattern, precision="bfloat16").advance().lessons.keys() == whole.lessons.keys()
    assert tiny(pattern, wiring={"reversible": True}).advance().lessons.keys() == whole.lessons.keys()


def test_a_restored_trainer_goes_on_bit_for_bit():
    whole, first, second = (tiny(DSA) for _ in range(3))
    straight = list(whole.run())
    for _ in range(5):
        first.advance()
    second.restore({n: t.clone() for n, t in first.tensors().items()}, first.step, first.seconds)
    assert [(p.loss, p.lessons) for p in second.run()] == [(p.loss, p.lessons) for p in straight[5:]]
    assert all(torch.equal(second.model.state_dict()[n], t) for n, t in whole.model.state_dict().items())


def test_metrics_of_a_run_hold_the_losses(tmp_path):
    settings = {"n_layers": 1, "d_model": 16, "context": 16, "batch_size": 4, "tokens": 16 * 4 * 3, "eval_tokens": 64}
    train(TrainConfig(arch=DSA.format(1), out=tmp_path, threads=1, **settings))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["lessons"]["0.0"] > 0 for line in lines)
