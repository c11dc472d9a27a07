"""Every mixer says what it is, truthfully, in its own file."""

from __future__ import annotations

import pytest
import torch

from slipstream.core.cards import card
from slipstream.core.errors import InputError

from .conftest import B, T


def test_the_card_read_from_the_file_is_the_class(cls):
    c = card(cls.name)
    assert (c.class_name, c.family, c.module) == (cls.__name__, cls.family, cls.__module__)
    assert (c.paper, c.use_when, c.train_order, c.decode_order) == (cls.paper, cls.use_when, cls.train_order, cls.decode_order)
    assert list(c.fields) == list(cls.Config.model_fields)
    assert next(iter(c.fields)) == "d_model"


def test_the_card_is_complete(cls):
    c = card(cls.name)
    assert c.title and c.equation.strip() and len(c.paper) > 20 and len(c.use_when) > 20
    assert cls.oracle and cls.symbols is not None
    for name, (_, _, comment) in c.fields.items():
        assert comment, f"{cls.name}.Config.{name} has no comment"


def test_the_growth_on_the_card_is_that_of_the_slots(mixer):
    grows = any(s.grows for s in mixer.slots().values())
    assert card(mixer.name).grows == grows
    assert (card(mixer.name).state_growth == "none") == (not mixer.slots())


def test_default_sizes_fit_common_widths(cls):
    for d_model in (32, 64, 192, 256):
        mixer = cls(cls.Config(d_model=d_model))
        y = mixer(torch.randn(1, 5, d_model))
        assert y.shape == (1, 5, d_model)


def test_parameters_spared_from_decay_exist(mixer):
    names = {n.rpartition(".")[2] for n, _ in mixer.named_parameters()}
    assert set(mixer.no_weight_decay) <= names


def test_an_unknown_setting_is_an_error_with_a_suggestion(cls):
    with pytest.raises(InputError, match="d_model"):
        cls.Config(d_modle=64)


def test_refusals_raise_with_the_reason(mixer, x):
    calls = {
        "step": lambda: mixer.step(x[:, :1], mixer.init_state(B, T)),
        "prefill": lambda: mixer.prefill(x, mixer.init_state(B, T)),
    }
    assert set(mixer.limits) <= set(calls)
    for mode, why in mixer.limits.items():
        with pytest.raises(InputError, match=why):
            calls[mode]()
