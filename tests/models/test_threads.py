"""The number of threads is the one that was faster; measuring changes nothing else."""

from __future__ import annotations

import time

import pytest
import torch

from slipstream.models import threads
from slipstream.models.language_model import language_model


@pytest.mark.parametrize("faster", [1, 3])
def test_the_faster_number_is_chosen_and_torch_is_left_as_it_was(monkeypatch, faster):
    monkeypatch.setattr(threads, "cores", lambda: 3)
    before = torch.get_num_threads()
    work = lambda: time.sleep(0 if torch.get_num_threads() == faster else 0.005)  # noqa: E731
    assert threads.fitting_threads(work) == faster
    assert torch.get_num_threads() == before


def test_one_core_is_not_measured(monkeypatch):
    monkeypatch.setattr(threads, "cores", lambda: 1)
    assert threads.fitting_threads(lambda: pytest.fail("was measured")) == 1


def test_an_error_in_the_work_leaves_torch_as_it_was(monkeypatch):
    monkeypatch.setattr(threads, "cores", lambda: 3)
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        threads.fitting_threads(lambda: 1 // 0)
    assert torch.get_num_threads() == before


def test_measuring_leaves_the_model_as_it_was():
    model = language_model("attention, mamba", n_layers=2, d_model=32)
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    for work in (threads.writing(model), threads.learning(model)):
        work()
        work()
    assert all(p.grad is None and torch.equal(p, kept[n]) for n, p in model.named_parameters())
