"""A step that is a recording gives what the model's own step gives, for every architecture."""

from __future__ import annotations

import json

import pytest
import torch

import slipstream as ss
from slipstream.models.captured_step import CapturedStep
from slipstream.ops.backends.cpp.library import find_compiler

VOCABULARY = 50
ON_THE_HOST = {  # whose step asks how far its rows are; without kernels, that of every attention does
    "csa", "deltaformer", "dsa", "forgetting_transformer", "hca", "hyena", "lact", "memorizing_transformer", "moba", "nsa",
    "path_attention", "sinkhorn", "sparse_transformer", "switch_moe",
}  # fmt: skip


def model_of(pattern: str, n_layers: int = 2, d_model: int = 16, **settings):
    model = ss.language_model(pattern, n_layers=n_layers, d_model=d_model, vocab_size=VOCABULARY, **settings)
    return model.double().eval()


def tokens_of(steps: int, rows: int = 2):
    return torch.randint(0, VOCABULARY, (steps, rows, 1), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def compare(model, steps: int, lengths=(5, 3)) -> CapturedStep:
    """From a ragged prompt on, with a state that has to grow on the way."""
    prompt = tokens_of(7, len(lengths))[..., 0].T
    _, state = model.prefill(prompt, model.init_state(len(lengths), 8), torch.tensor(lengths))
    step, own, kept = CapturedStep(model), state.clone(), state
    for token in tokens_of(steps, len(lengths)):
        expected, own = model.step(token, model.reserve(own, 1))
        logits, kept = step(token, kept)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    assert torch.equal(kept.length, own.length)
    for name, slot in own.slots.items():
        torch.testing.assert_close(
            kept[name][:, : slot.shape[1]] if slot.ndim > 1 else kept[name], slot, rtol=0, atol=1e-12
        )
    return step


@pytest.mark.parametrize("name", sorted(n for n, c in ss.mixers().items() if not c.limits))
def test_every_mixer(name):
    tiny = ss.mixers()[name].tiny
    settings = tiny.model_dump(exclude_unset=True, exclude={"d_model"})
    written = ", ".join(f"{n}={json.dumps(v)}" for n, v in settings.items())
    step = compare(model_of(f"{name}({written})/none" if written else f"{name}/none", d_model=tiny.d_model), 40)
    if find_compiler():
        assert bool(step.why_not) == (name in ON_THE_HOST), step.why_not


@pytest.mark.parametrize(
    ("pattern", "settings"),
    [
        ("mamba2, gated_deltanet, attention(n_heads=2)", {}),
        ("attention(n_heads=2, cache=kv_int8)", {}),
        ("attention(n_heads=2)", {"share_kv": 2}),
        ("gated_deltanet(n_heads=2)/moe(n_experts=4, top_k=2)", {}),
        ("attention(n_heads=2)", {"skip_every": 2}),
        ("attention(n_heads=2)", {"reversible": True}),
    ],
)
def test_models_with_options(pattern, settings):
    compare(model_of(pattern, n_layers=3, **settings), 20)


def test_quantised_weights():
    model = ss.language_model("gated_deltanet(n_heads=2)", n_layers=2, d_model=64, vocab_size=VOCABULARY).eval()
    assert not compare(ss.quantise(model, "int8"), 10).why_not


@torch.no_grad()
def test_another_state_goes_on_where_it_stands():
    """A fork, rows that were dropped, and the first state again."""
    model = model_of("attention(n_heads=2), mamba2(n_heads=2)")
    step, token = CapturedStep(model), tokens_of(1)[0]
    _, state = step(token, model.init_state(2, 4))
    early = state.clone()
    for _ in range(3):
        logits, state = step(token, state)
    later, one = state.clone(), state.rows(torch.tensor([1]))
    again = early
    for _ in range(3):
        repeated, again = step(token, again)
    torch.testing.assert_close(repeated, logits, rtol=0, atol=1e-12)
    alone, _ = step(token[1:], one)
    both, _ = step(token, later)
    torch.testing.assert_close(alone, both[1:], rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_state_it_was_given_is_left_as_it_was_where_it_is_not_its_own():
    model = model_of("gated_deltanet(n_heads=2)")
    given = model.init_state(1)
    before = given.clone()
    CapturedStep(model)(tokens_of(1, 1)[0], given)
    assert all(torch.equal(given[n], before[n]) for n in given.slots)


@torch.no_grad()
def test_logits_are_kept_by_whoever_asked_for_them():
    model = model_of("mamba2(n_heads=2)")
    step, (a, b) = CapturedStep(model), tokens_of(2, 1)
    first, state = step(a, model.init_state(1))
    kept = first.clone()
    step(b, state)
    assert torch.equal(first, kept)
