"""Batches, the held-out part, and tokens on disk."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slipstream.core.errors import InputError
from slipstream.data.text import text_data
from slipstream.data.windows import Windows


def test_a_batch_is_a_function_of_seed_and_step():
    data, again = text_data(context=32), text_data(context=32)
    there = {step: data.batch(step, 4, seed=1) for step in (0, 5, 700)}
    for step in (700, 0, 5):  # in another order, on another object
        assert torch.equal(again.batch(step, 4, seed=1), there[step])
    assert there[0].shape == (4, 33)
    assert there[0].dtype == torch.int64
    assert not torch.equal(there[0], data.batch(0, 4, seed=2))
    assert not torch.equal(there[0], there[5])


def test_half_a_batch_twice_is_a_whole_one():
    """The order of windows does not depend on how many are taken at a time."""
    data = text_data(context=16)
    halves = torch.cat([data.batch(6, 4, 0), data.batch(7, 4, 0)])
    assert torch.equal(data.batch(3, 8, 0), halves)


def test_an_epoch_reads_each_token_once_and_the_next_starts_elsewhere():
    windows = Windows(np.arange(1000), 10)
    epochs = [
        torch.cat([windows.batch(e * windows.per_epoch + i, 1, 3) for i in range(windows.per_epoch)]) for e in (0, 1)
    ]
    for epoch in epochs:
        predicted = epoch[:, 1:].flatten().sort().values
        assert torch.equal(predicted, torch.arange(predicted[0], predicted[0] + 10 * windows.per_epoch))
        assert len(predicted) >= 980
    assert set(epochs[0][:, 0].tolist()) != set(epochs[1][:, 0].tolist())


def test_training_never_sees_the_held_out_part(tmp_path):
    file = tmp_path / "x.txt"
    file.write_text("a" * 900 + "b" * 100)
    data = text_data(file, context=16)
    for step in range(60):
        assert (data.batch(step, 2, 0) == ord("a")).all()
    for batch, _ in data.validation(4):
        assert (batch == ord("b")).all()


def test_validation_is_fixed_and_does_not_overlap():
    data = text_data(context=64)
    batches = list(data.validation(8))
    whole = torch.cat([b for b, _ in batches])
    assert torch.equal(whole[:-1, -1], whole[1:, 0])  # each begins with the last token of the one before
    assert torch.equal(whole, torch.cat([b for b, _ in data.validation(3)]))
    assert sum(n for _, n in batches) == len(whole) * 64
    assert len(torch.cat([b for b, _ in data.validation(8, most=20)])) == 20


def test_validation_bytes_are_those_of_the_text_for_any_tokenizer():
    data = text_data(tokenizer="bpe:500", context=32)
    for batch, n_bytes in data.validation(1, most=50):
        assert n_bytes == len(data.tokenizer.decode(batch[0, 1:].tolist()).encode())
    assert data.bytes_per_token == pytest.approx(684_768 / len(data.tokens.ids))


@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_tokens_on_disk_are_the_tokens(tmp_path, spec):
    fresh = text_data(tokenizer=spec, context=32)
    kept = fresh.kept_in(tmp_path)
    found = text_data(tokenizer=spec, context=32, folder=tmp_path)
    assert isinstance(found.tokens.ids, np.memmap)
    for data in (kept, found):
        assert data.key == fresh.key
        assert torch.equal(data.batch(3, 4, 0), fresh.batch(3, 4, 0))
        assert [n for _, n in data.validation(4)] == [n for _, n in fresh.validation(4)]
    assert [p.name for p in tmp_path.iterdir()] == [fresh.key]


def test_the_key_changes_with_text_and_tokenizer(tmp_path):
    file = tmp_path / "x.txt"
    file.write_text("some text " * 100)
    first = text_data(file, context=8).key
    assert text_data(file, "bpe:270", context=8).key != first
    file.write_text("other text " * 100)
    assert text_data(file, context=8).key != first


def test_a_short_text_shortens_only_a_context_that_nobody_asked_for(tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("x" * 100)
    data = text_data(file)
    assert data.context == 49
    assert "context 49 instead of 256" in data.notes[0]
    assert data.batch(0, 2, 0).shape == (2, 50)
    assert sum(len(b) for b, _ in data.validation(4)) == 1
    with pytest.raises(InputError, match=r"has 100 tokens, and context 64 needs 130 .* or give --context 49 at most"):
        text_data(file, context=64)
    file.write_text("tiny")
    with pytest.raises(InputError, match="has 4 tokens, and context 8 needs 18"):
        text_data(file)
