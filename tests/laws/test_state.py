"""A state is as declared, belongs to its rows, and can be stored."""

from __future__ import annotations

import torch

from slipstream.core.state import State

from .conftest import B, T, close


def test_state_is_as_large_as_declared(mixer, x):
    _, state = mixer.prefill(x, mixer.init_state(B, T))
    assert state.nbytes == B * mixer.state_bytes(T)
    assert set(state.slots) == set(mixer.slots())
    for name, slot in mixer.slots().items():
        assert state[name].dtype == torch.promote_types(slot.dtype or x.dtype, x.dtype)


def test_state_grows_only_where_declared(mixer):
    grows = any(s.grows for s in mixer.slots().values())
    assert (mixer.state_bytes(2 * T) > mixer.state_bytes(T)) == grows


def test_rows_are_independent(mixer, x):
    _, state = mixer.prefill(x[:, :9], mixer.init_state(B, T))
    order = torch.tensor([2, 0])
    y, _ = mixer.prefill(x[order, 9:], state.clone().rows(order))
    close(y, mixer(x)[order, 9:])


def test_batches_can_be_joined(mixer, x):
    states = [mixer.prefill(x[b : b + 1, :9], mixer.init_state(1, 9 + 3 * b))[1] for b in range(B)]
    y, _ = mixer.prefill(x[:, 9:], State.cat(states))
    close(y, mixer(x)[:, 9:])


def test_packed_documents_are_as_alone(mixer, x):
    row = x.reshape(1, B * T, -1)
    bounds = [0, 5, 6, 29, 29, 40, B * T]
    y = mixer(row, torch.tensor(bounds))
    alone = [mixer(row[:, a:b]) for a, b in zip(bounds, bounds[1:])]
    close(y, torch.cat(alone, 1))


def test_padding_reaches_nothing(mixer, x):
    lengths = torch.tensor([T, 7, 0])
    first = x.clone()
    for b, n in enumerate(lengths):
        first[b, n:] = 1e4
    y, state = mixer.prefill(first, mixer.init_state(B, 2 * T), lengths)
    assert state.length.tolist() == lengths.tolist()
    y2, state = mixer.prefill(x, state)
    for b, n in enumerate(lengths):
        close(torch.cat([y[b, :n], y2[b]])[None], mixer(torch.cat([x[b, :n], x[b]])[None]))


def test_padding_in_a_second_piece_reaches_nothing(mixer, x):
    _, state = mixer.prefill(x[:, :5], mixer.init_state(B, 2 * T), torch.tensor([5, 2, 4]))
    second = x[:, 5:].clone()
    second[1, 3:] = torch.nan
    y, state = mixer.prefill(second, state, torch.tensor([T - 5, 3, T - 5]))
    y3, _ = mixer.prefill(x[:, :4], state)
    want = mixer(torch.cat([x[1, :2], x[1, 5:8], x[1, :4]])[None])
    close(torch.cat([y[1, :3], y3[1]])[None], want[:, 2:])


def test_a_stored_state_goes_on_bit_for_bit(mixer, x, tmp_path):
    _, state = mixer.prefill(x[:, :9], mixer.init_state(B, T))
    state.save(tmp_path / "state.safetensors")
    loaded = State.load(tmp_path / "state.safetensors")
    assert torch.equal(mixer.prefill(x[:, 9:], loaded)[0], mixer.prefill(x[:, 9:], state)[0])


def test_a_second_run_is_bit_for_bit_the_first(mixer, x):
    assert torch.equal(mixer(x), mixer(x))
    again = type(mixer)(mixer.config).double().eval()
    again.load_state_dict(mixer.state_dict())
    assert torch.equal(again(x), mixer(x))
