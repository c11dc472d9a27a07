"""A law that cannot fail proves nothing: planted faults, each caught by the law that is meant for it."""

from __future__ import annotations

import pytest
import torch

from slipstream.core.registry import mixer_class
from slipstream.core.state import State
from slipstream.laws import gradients, modes, precision, registry, state
from slipstream.laws.subject import judge

Attention = mixer_class("attention")
Window = mixer_class("sliding_window")


class SeesTheFuture(Attention):
    def forward(self, x, packed=None):
        return super().forward(x, packed) + 1e-3 * x.mean(1, keepdim=True)


class ForgetsAtCuts(Window):
    def prefill(self, x, state, lengths=None):
        return super().prefill(x, State(state.slots, torch.zeros_like(state.length)), lengths)


class WrongAfterOneStep(Attention):
    def step(self, x, state, lengths=None):
        y, new = super().step(x, state, lengths)
        return (y, State(new.slots, state.length)) if x.shape[1] == 1 else (y, new)


class ReadsPadding(Window):
    def prefill(self, x, state, lengths=None):
        y, new = super().prefill(x, state, None)
        return y, State(new.slots, state.length + (x.shape[1] if lengths is None else lengths))


class SecretlyKeepsMore(Window):
    def prefill(self, x, state, lengths=None):
        y, new = super().prefill(x, state, lengths)
        return y, State({**new.slots, "secret": x[:, :1]}, new.length)


class CutsTheGradient(Attention):
    def prefill(self, x, state, lengths=None):
        return super().prefill(x, state.detach(), lengths)


class ScalesInHalfPrecision(Attention):
    def _from_fresh(self, x, lengths=None):
        return super()._from_fresh(x.half().to(x.dtype), lengths)

    def prefill(self, x, state, lengths=None):
        return super().prefill(x.half().to(x.dtype) * 1.001, state, lengths)


class DeclaresALimitButRuns(Attention):
    limits = {"step": "it would have to see what is to come"}


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        (SeesTheFuture, gradients.the_future_reaches_no_output),
        (SeesTheFuture, modes.forward_is_the_equation),
        (ForgetsAtCuts, modes.any_cut_is_forward),
        (WrongAfterOneStep, modes.steps_are_forward),
        (ReadsPadding, state.padding_reaches_nothing),
        (SecretlyKeepsMore, state.state_is_as_declared),
        (CutsTheGradient, gradients.gradients_flow_through_the_state),
        (ScalesInHalfPrecision, precision.low_precision_stays_near),
        (DeclaresALimitButRuns, registry.refusals_say_why),
        (DeclaresALimitButRuns, modes.steps_are_forward),
    ],
)
def test_a_planted_fault_is_caught(fault, law):
    assert judge(law, fault) is not None
    assert judge(law, fault.__mro__[1]) is None
