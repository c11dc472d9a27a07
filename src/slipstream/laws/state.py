"""A state is as declared, belongs to its rows, sees no padding, and can be stored."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import torch

from slipstream.core.state import State
from slipstream.laws.subject import B, Law, Subject, T, close, expect, needs


@needs("prefill")
def state_is_as_declared(s: Subject) -> None:
    """A state has the slots, bytes and dtypes that are declared, and grows only where declared."""
    m, x = s.mixer, s.input()
    _, state = m.prefill(x, m.init_state(B, T))
    expect(state.nbytes == B * m.state_bytes(T), f"{state.nbytes} bytes, declared {B * m.state_bytes(T)}")
    expect(set(state.slots) == set(m.slots()), f"slots {sorted(state.slots)}, declared {sorted(m.slots())}")
    for name, slot in m.slots().items():
        expect(state[name].dtype == slot.dtype_beside(x.dtype), f"{name} is {state[name].dtype}")
    grows = any(slot.grows for slot in m.slots().values())
    expect((m.state_bytes(2 * T) > m.state_bytes(T)) == grows, "it grows where no slot says so")


def rows_are_independent(s: Subject) -> None:
    """Rows of a batch are independent."""
    order = torch.tensor([2, 0])
    close(s.mixer(s.input()[order]), s.mixer(s.input())[order])


@needs("prefill")
def states_are_by_rows(s: Subject) -> None:
    """Rows of a state can be dropped, reordered and joined."""
    m, x, want = s.mixer, s.input(), s.mixer(s.input())
    _, state = m.prefill(x[:, :9], m.init_state(B, T))
    order = torch.tensor([2, 0])
    close(m.prefill(x[order, 9:], state.clone().rows(order))[0], want[order, 9:])
    alone = [m.prefill(x[b : b + 1, :9], m.init_state(1, 9 + 3 * b))[1] for b in range(B)]
    close(m.prefill(x[:, 9:], State.cat(alone))[0], want[:, 9:])


def packed_documents_are_as_alone(s: Subject) -> None:
    """Packed documents are as alone."""
    row = s.input().reshape(1, B * T, -1)
    bounds = [0, 5, 6, 29, 29, 40, B * T]
    alone = [s.mixer(row[:, a:b]) for a, b in pairwise(bounds)]
    close(s.mixer(row, torch.tensor(bounds)), torch.cat(alone, 1))


@needs("prefill")
def padding_reaches_nothing(s: Subject) -> None:
    """Padding reaches no output and no state, whatever it holds."""
    m, x = s.mixer, s.input()
    for rubbish in (1e4, torch.nan):
        lengths, second = torch.tensor([T, 7, 0]), torch.tensor([2, 5, 4])
        y1, state = m.prefill(_soiled(x, lengths, rubbish), m.init_state(B, 2 * T), lengths)
        expect(state.length.tolist() == lengths.tolist(), f"length is {state.length.tolist()}")
        y2, state = m.prefill(_soiled(x[:, :5], second, rubbish), state, second)
        y3, _ = m.prefill(x[:, :4], state)
        for b, (n, k) in enumerate(zip(lengths.tolist(), second.tolist())):
            want = m(torch.cat([x[b, :n], x[b, :k], x[b, :4]])[None])
            close(torch.cat([y1[b, :n], y2[b, :k], y3[b]])[None], want)


def _soiled(x: torch.Tensor, lengths: torch.Tensor, rubbish: float) -> torch.Tensor:
    padding = torch.arange(x.shape[1]) >= lengths[:, None]
    return x.masked_fill(padding[..., None], rubbish)


@needs("prefill")
def a_stored_state_goes_on(s: Subject) -> None:
    """A stored state and stored weights go on bit for bit."""
    m, x = s.mixer, s.input()
    _, state = m.prefill(x[:, :9], m.init_state(B, T))
    with tempfile.TemporaryDirectory() as folder:
        state.save(Path(folder) / "state.safetensors")
        loaded = State.load(Path(folder) / "state.safetensors")
    again = type(m)(m.config).double().eval()
    again.load_state_dict(m.state_dict())
    expect(torch.equal(again.prefill(x[:, 9:], loaded)[0], m.prefill(x[:, 9:], state)[0]), "outputs differ")
    expect(torch.equal(m(x), m(x)), "a second run differs from the first")


LAWS: list[Law] = [
    state_is_as_declared,
    rows_are_independent,
    states_are_by_rows,
    packed_documents_are_as_alone,
    padding_reaches_nothing,
    a_stored_state_goes_on,
]
