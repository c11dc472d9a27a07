"""Reversible residual layers: the gradients of what they compute, in memory that does not grow with depth."""

from __future__ import annotations

import json

import pytest
import torch

import slipstream as ss
from slipstream.bench.saved import most_saved
from slipstream.core.errors import InputError
from slipstream.models.config import Wiring
from slipstream.models.sizing import n_parameters, sized
from slipstream.train.config import TrainConfig
from slipstream.train.run import train

PATTERNS = (
    "attention",
    "attention/none",  # one mixer a block: the streams must change places across blocks
    "2*gated_deltanet(n_heads=2), sliding_window(window=6)/mlp",
    "mamba2(d_state=8)/none, rwkv6/rwkv_channel_mix, lstm",
)


def tiny(pattern="attention", n_layers=4, **kw):
    return ss.language_model(pattern, n_layers=n_layers, d_model=32, vocab_size=50, reversible=True, **kw).double()


@pytest.fixture
def tokens():
    return torch.randint(0, 50, (2, 21), generator=torch.Generator().manual_seed(0))


def by_the_equation(model, tokens, packed=None):
    """y1 = x1 + f(x2), y2 = x2 + g(y1), as printed and as autograd does it."""
    x1 = x2 = model.embedding(tokens)
    layers = [(norm, mixer) for b in model.stack.blocks for norm, mixer in zip(b.norms, b.mixers)]
    for n, (norm, mixer) in enumerate(layers):
        if n % 2 == 0:
            x1 = x1 + mixer(norm(x2), packed)
        else:
            x2 = x2 + mixer(norm(x1), packed)
    return model.head(model.stack.norm(x1 + x2))


def gradients(model, logits):
    weights = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    (logits * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(got, want, **tolerance):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("n_layers", [3, 4])
def test_gradients_are_those_of_the_equation(pattern, n_layers, tokens):
    model = tiny(pattern, n_layers)
    logits, want = model(tokens), by_the_equation(model, tokens)
    torch.testing.assert_close(logits, want, rtol=1e-10, atol=1e-10)
    assert_same(gradients(model, logits), gradients(model, want), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_documents(pattern, tokens):
    model, row, bounds = tiny(pattern), tokens.reshape(1, -1), torch.tensor([0, 5, 21, 21, 42])
    logits, want = model(row, bounds), by_the_equation(model, row, bounds)
    assert_same(gradients(model, logits), gradients(model, want), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logits[:, 21:], model(tokens[1:]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_prefill_and_steps_are_forward(pattern, tokens):
    model = tiny(pattern)
    want = model(tokens)
    a, state = model.prefill(tokens[:, :8], logits="all")
    b, state = model.prefill(tokens[:, 8:8], state, logits="all")
    c, state = model.prefill(tokens[:, 8:19], state, logits="all")
    state = model.reserve(state, 2)
    d, state = model.step(tokens[:, 19:20], state)
    e, state = model.step(tokens[:, 20:], state)
    torch.testing.assert_close(torch.cat([a, b, c, d, e], 1), want, rtol=1e-10, atol=1e-10)
    logits, state = model.prefill(tokens, lengths=torch.tensor([21, 9]))
    torch.testing.assert_close(logits[1], model(tokens[1:, :9])[0, -1:], rtol=1e-10, atol=1e-10)


def test_a_second_backward_and_frozen_weights(tokens):
    """Nothing is spent by a backward pass; weights that are not trained get no gradient and stop none."""
    model = tiny()
    logits = model(tokens)
    first = torch.autograd.grad(logits.sum(), model.embedding.weight, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(logits.sum(), model.embedding.weight)[0], first)
    for p in model.stack.blocks[1:].parameters():
        p.requires_grad_(False)
    logits, want = model(tokens), by_the_equation(model, tokens)
    logits.sum().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.stack.blocks[1:].parameters())
    model.zero_grad()
    want.sum().backward()
    assert_same(got, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, rtol=1e-10, atol=1e-10)


def test_what_no_output_depends_on_gets_no_gradient(tokens):
    """Not zeros, by which an optimiser would let it decay: LaCT learns step sizes only where there is a second chunk."""
    model = tiny("lact/none", 2)
    model(tokens).sum().backward()
    none = {n.rpartition("mixers.0.")[2] for n, p in model.named_parameters() if p.grad is None}
    model.zero_grad()
    by_the_equation(model, tokens).sum().backward()
    assert none == {n.rpartition("mixers.0.")[2] for n, p in model.named_parameters() if p.grad is None}
    assert "lr_proj.weight" in none


@pytest.mark.parametrize("inside", [False, True])
def test_bfloat16_under_autocast(inside, tokens):
    """The second run of a layer is at the precision of the first, wherever the backward pass is called."""
    model = tiny("2*gated_deltanet(n_heads=2), attention").float()
    with torch.autocast("cpu", torch.bfloat16):
        logits, plain = model(tokens), by_the_equation(model, tokens)
        assert torch.equal(logits, plain)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        got, want = gradients(model, logits), gradients(model, plain)
    for name in want:
        assert (got[name] - want[name]).norm() < 1e-2 * want[name].norm(), name
    assert (want["embedding.weight"] - gradients(model, by_the_equation(model, tokens))["embedding.weight"]).norm() > 0


def test_memory_does_not_grow_with_depth(tokens):
    def saved(depth, **kw):
        model = ss.language_model("attention", n_layers=depth, d_model=32, vocab_size=50, d_ff=64, **kw)
        return most_saved(model, tokens)

    shallow, deep = saved(2, reversible=True), saved(16, reversible=True)
    assert deep == shallow
    assert saved(16) > 6 * saved(2) > 6 * shallow


@pytest.mark.parametrize("name", sorted(n for n, c in ss.mixers().items() if not c.limits))
def test_no_mixer_draws_random_numbers_in_forward(name):
    """What reversible layers rely on: run again, a mixer gives the same."""
    cls = ss.mixers()[name]
    with torch.random.fork_rng(devices=[]):
        mixer = cls(cls.tiny)
        x = torch.randn(1, 5, cls.tiny.d_model)
        before = torch.random.get_rng_state()
        mixer(x)
        assert torch.equal(torch.random.get_rng_state(), before)


def test_a_checkpoint_carries_it(tmp_path, tokens):
    model = tiny().float()
    model.save(tmp_path)
    again = ss.load(tmp_path)
    assert again.config.reversible
    assert torch.equal(again(tokens), model(tokens))


def test_sizes_are_those_of_the_ordinary_model():
    config = sized("attention", 300_000, 256, None, None, reversible=True)
    assert config.reversible
    assert n_parameters(config) == n_parameters(config.model_copy(update={"reversible": False}))


def test_it_trains_and_goes_on(tmp_path):
    """Through the settings of a training run; a run that was started before there was the option has its default."""
    small = {"n_layers": 2, "d_model": 16, "context": 16, "tokens": 640, "threads": 1, "eval_tokens": 64}
    result = train(TrainConfig(arch="attention", reversible=True, out=tmp_path / "new", **small))
    assert ss.load(result.out).config.reversible
    points = [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]
    assert points[-1]["bits_per_byte"] < points[0]["bits_per_byte"]
    with pytest.raises(InputError, match="reversible"):
        train(TrainConfig(arch="attention", out=tmp_path / "new", **small))
    older = TrainConfig(arch="attention", out=tmp_path / "older", **small)
    train(older)
    file = tmp_path / "older" / "run.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps({n: v for n, v in kept.items() if n not in Wiring.model_fields}))
    assert train(older).step == 5


def test_shared_caches_are_refused():
    with pytest.raises(InputError, match="choose reversible or share_kv"):
        tiny("attention", share_kv=2)
