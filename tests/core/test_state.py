"""State: what is written once for every architecture."""

from __future__ import annotations

import pytest
import torch

from slipstream.core.errors import InputError
from slipstream.core.state import Slot, State, grow


def state(b=2):
    return State({"S": torch.randn(b, 2, 3), "k": torch.randn(b, 4, 1)}, torch.arange(b))


def test_slot_defaults_are_at_least_float32():
    assert Slot((3,)).dtype is torch.float32


def test_clone_is_independent():
    a = state()
    b = a.clone()
    b["S"].zero_()
    assert a["S"].abs().sum() > 0


def test_scope_and_join_are_inverse():
    parts = {"0.mixer": state(), "1.mixer": state()}
    whole = State.join(parts, parts["0.mixer"].length)
    assert set(whole.slots) == {"0.mixer.S", "0.mixer.k", "1.mixer.S", "1.mixer.k"}
    assert torch.equal(whole.scope("1.mixer")["S"], parts["1.mixer"]["S"])
    assert set(whole.scope("1").slots) == {"mixer.S", "mixer.k"}


def test_cat_brings_growing_slots_to_the_largest():
    a, b = state(), state()
    b.slots["k"] = torch.randn(2, 7, 1)
    joined = State.cat([a, b])
    assert joined["k"].shape == (4, 7, 1)
    assert torch.equal(joined["k"][:2, :4], a["k"])


def test_rows_take_index_or_mask():
    a = state(3)
    assert torch.equal(a.rows(torch.tensor([2, 2]))["S"][0], a["S"][2])
    assert len(a.rows(torch.tensor([True, False, True])).length) == 2


def test_grow_keeps_what_is_there():
    k = torch.randn(2, 3, 1)
    assert torch.equal(grow(k, 5)[:, :3], k)
    assert grow(k, 2) is k


def test_a_slot_may_grow_by_one_entry_for_several_tokens():
    slot = Slot((0, 3), grows=True, every=4)
    assert [slot.after(tokens) for tokens in (0, 1, 4, 5)] == [(0, 3), (1, 3), (1, 3), (2, 3)]
    assert Slot((7, 3)).after(50) == (7, 3)


def test_nbytes_counts_all_slots():
    assert state().nbytes == (2 * 2 * 3 + 2 * 4) * 4


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    state().save(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match="no complete state"):
        State.load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "s.safetensors"
    state().save(path)
    before = path.read_bytes()
    with pytest.raises(Exception, match=r"."):
        state().save(path, {"not a string": 3})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
