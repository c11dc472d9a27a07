"""Every mixer says what it is, truthfully, in its own file."""

from __future__ import annotations

import torch

from slipstream.core.cards import card
from slipstream.core.errors import InputError
from slipstream.laws.subject import Law, Subject, expect, is_refused


def the_card_is_the_class(s: Subject) -> None:
    """What is read from the file without running it is what the class says."""
    c, cls = card(s.cls.name), s.cls
    read = (c.class_name, c.family, c.module, c.paper, c.use_when, c.train_order, c.decode_order)
    said = (cls.__name__, cls.family, cls.__module__, cls.paper, cls.use_when, cls.train_order, cls.decode_order)
    expect(read == said, f"the file reads {read}, the class says {said}")
    expect(
        list(c.fields) == list(cls.Config.model_fields),
        f"fields read {list(c.fields)}, has {list(cls.Config.model_fields)}",
    )
    expect(
        c.grows == any(slot.grows for slot in s.mixer.slots().values()),
        "grows=True stands in the file, or not, against the slots",
    )
    expect(c.remembers == bool(s.mixer.slots()), "it has slots and says it has no memory, or the other way round")


def the_card_is_complete(s: Subject) -> None:
    """Title, equation, paper, use, memory and every setting are explained."""
    c = card(s.cls.name)
    expect(bool(c.title and c.equation.strip()), "the module docstring needs a title line and an indented equation")
    expect(
        len(c.paper) > 20 and len(c.use_when) > 20 and bool(s.cls.oracle), "paper, use_when and oracle must be stated"
    )
    if c.remembers:
        expect(all((c.writes, c.erases, c.decays, c.reads)), "writes, erases, decays and reads must be stated")
    silent = [n for n, (_, _, comment) in c.fields.items() if not comment]
    expect(not silent, f"Config fields without a comment on their line: {silent}")
    names = {n.rpartition(".")[2] for n, _ in s.mixer.named_parameters()}
    expect(
        set(s.cls.no_weight_decay) <= names,
        f"no_weight_decay names {s.cls.no_weight_decay}, parameters are {sorted(names)}",
    )
    parts = {n.partition(".")[0] for n, _ in s.mixer.named_parameters()}
    expect(set(s.cls.no_gradient) <= parts, f"no_gradient names {s.cls.no_gradient}, parts are {sorted(parts)}")


def default_settings_fit_common_widths(s: Subject) -> None:
    """Default settings fit common widths, and an unknown one is refused."""
    for d_model in (32, 64, 192, 256):
        y = s.cls(s.cls.Config(d_model=d_model))(torch.randn(1, 5, d_model))
        expect(y.shape == (1, 5, d_model), f"at d_model {d_model} the shape is {tuple(y.shape)}")
    try:
        s.cls.Config(d_modle=64)
    except InputError as error:
        expect("d_model" in str(error), f"the error suggests nothing: {error}")
    else:
        raise AssertionError("an unknown setting is accepted")


def refusals_say_why(s: Subject) -> None:
    """What it cannot do in principle it refuses, with the declared reason."""
    for mode in s.cls.limits:
        is_refused(s, mode)


LAWS: list[Law] = [the_card_is_the_class, the_card_is_complete, default_settings_fit_common_widths, refusals_say_why]
