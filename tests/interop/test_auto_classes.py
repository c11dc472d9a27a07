"""slipstream's own checkpoints in transformers: AutoModelForCausalLM, generate, padding, gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import slipstream as ss
import slipstream.hf  # registers

PATTERNS = ["gated_deltanet, sliding_window(window=5)", "attention(n_heads=2)", "mamba2/none"]


@pytest.fixture(params=PATTERNS)
def pair(request, tmp_path):
    ours = ss.language_model(request.param, n_layers=2, d_model=32, vocab_size=61, seed=4).eval()
    with torch.no_grad():
        ours.embedding.weight.mul_(20)
    ours.save(tmp_path)
    return ours, AutoModelForCausalLM.from_pretrained(tmp_path)


def tokens(*shape):
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(2))


def test_the_same_logits_and_loss(pair):
    ours, theirs = pair
    assert isinstance(theirs, ss.hf.SlipstreamForCausalLM)
    x = tokens(2, 13)
    out = theirs(input_ids=x, labels=x)
    torch.testing.assert_close(out.logits, ours(x))
    out.loss.backward()
    assert all(p.grad is not None for p in theirs.parameters())


def test_greedy_generation_is_ours(pair):
    ours, theirs = pair
    x = tokens(1, 9)
    want = list(ss.generate(ours, x[0].tolist(), max_new_tokens=8, temperature=0))
    found = theirs.generate(x, max_new_tokens=8, do_sample=False)
    assert found[0, 9:].tolist() == want


def test_padding_on_the_left_changes_nothing(pair):
    _, theirs = pair
    x = tokens(2, 9)
    alone = [theirs.generate(row[None, n:], max_new_tokens=6, do_sample=False)[0, 9 - n :] for row, n in zip(x, (0, 4))]
    mask = torch.ones_like(x)
    mask[1, :4] = 0
    together = theirs.generate(x, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert together[:, 9:].tolist() == [row.tolist() for row in alone]


def test_beams_take_their_states_with_them(pair):
    ours, theirs = pair
    x = tokens(1, 9)
    beams = theirs.generate(x, max_new_tokens=6, do_sample=False, num_beams=4, num_return_sequences=4)
    scores = [ours(row[None])[0].log_softmax(-1)[8:-1].gather(1, row[9:, None]).sum().item() for row in beams]
    assert scores == sorted(scores, reverse=True)
    greedy = theirs.generate(x, max_new_tokens=6, do_sample=False)
    assert scores[0] >= ours(greedy)[0].log_softmax(-1)[8:-1].gather(1, greedy[0, 9:, None]).sum().item() - 1e-4


def test_what_it_saves_slipstream_loads(pair, tmp_path):
    ours, theirs = pair
    theirs.save_pretrained(tmp_path / "again")
    x = tokens(1, 7)
    assert torch.equal(ss.load(tmp_path / "again")(x), ours(x))
    assert AutoConfig.from_pretrained(tmp_path / "again").ours() == ours.config
