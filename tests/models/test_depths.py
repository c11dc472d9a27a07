"""Mixture of depths: tokens that go round a layer leave no trace in it, and any cut of a text gives the same."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import slipstream as ss
from slipstream.core.auxiliary import Collector
from slipstream.core.errors import InputError
from slipstream.core.state import State
from slipstream.data.text import text_data
from slipstream.models.depths import LOSS, Skipping
from slipstream.train.config import Recipe
from slipstream.train.loop import Trainer

B, T, D = 3, 23, 16
MIXERS = ["attention", "gated_deltanet", "sliding_window", "mamba2", "lstm", "moe", "swiglu"]


def skipping(name):
    torch.manual_seed(0)
    layer = Skipping(ss.mixer(name, d_model=D), 0.5).double()
    for p in layer.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return layer


def input():
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MIXERS)
def test_all_modes_are_the_equation(name):
    layer, x = skipping(name), input()
    want = layer.reference(x)
    assert 0.2 < (want.abs().sum(-1) > 0).double().mean() < 0.8
    close(layer(x), want)
    for cut in ((T,), (1, 22), (8, 0, 8, 7), (1,) * T):
        state, ys = layer.init_state(B, 4), []
        for piece in x.split(list(cut), 1):
            y, state = layer.prefill(piece, state)
            ys.append(y)
        close(torch.cat(ys, 1), want)
    assert state.length.tolist() == [T] * B and state["passed"].min() > 0 and state["passed"].max() < T
    for rows in (slice(None), slice(0, 1)):
        state, ys = layer.init_state(len(x[rows]), T), []
        for t in range(T):
            y, state = layer.step(x[rows, t : t + 1], state)
            ys.append(y)
        close(torch.cat(ys, 1), want[rows])


@pytest.mark.parametrize("name", MIXERS)
def test_gradients_are_the_equations_and_reach_the_router(name):
    layer, x = skipping(name), input().requires_grad_()
    probe = torch.randn_like(x)
    got, want = (torch.autograd.grad((f(x) * probe).sum(), [x, *layer.parameters()]) for f in (layer, layer.reference))
    for a, b in zip(got, want):
        close(a, b)


@pytest.mark.parametrize("name", ["attention", "gated_deltanet"])
def test_ragged_rows_and_packed_documents(name):
    layer, x, lengths = skipping(name), input(), torch.tensor([T, 7, 0])
    soiled = x.masked_fill((torch.arange(T) >= lengths[:, None])[..., None], torch.nan)
    y1, state = layer.prefill(soiled, layer.init_state(B, 2 * T), lengths)
    y2, _ = layer.prefill(x[:, :5], state)
    for b, n in enumerate(lengths.tolist()):
        want = layer(torch.cat([x[b, :n], x[b, :5]])[None])[0]
        close(torch.cat([y1[b, :n], y2[b]]), want)
    row, bounds = x.reshape(1, B * T, D), [0, 5, 5, 30, B * T]
    alone = [layer(row[:, a:b]) for a, b in pairwise(bounds)]
    close(layer(row, torch.tensor(bounds)), torch.cat(alone, 1))


def test_a_token_that_goes_round_is_not_read_at_all():
    layer, x = skipping("attention"), input()
    layer.router.weight.data.zero_()
    layer.router.bias.data.fill_(-1.0)
    for p in layer.mixer.parameters():
        p.data.fill_(torch.nan)
    assert not layer(x).any()
    y, state = layer.step(x[:, :1], layer.init_state(B, T))
    assert not y.any() and state["passed"].tolist() == [0] * B and state.length.tolist() == [1] * B


def test_the_router_is_taught_whom_a_capacity_would_choose():
    layer, collector = skipping("swiglu"), Collector()
    with collector.listening():
        layer(input())
    logits = layer.router(input())[..., 0]
    target = torch.zeros_like(logits).scatter(1, logits.topk(12).indices, 1.0)
    p = logits.sigmoid()
    want = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    close(collector.penalty(), LOSS * want)
    assert collector.usage[layer].load.sum() == B * T


def test_a_model_is_one_function_in_all_modes_and_its_state_can_be_stored(tmp_path):
    model = ss.language_model("gated_deltanet, attention/moe", n_layers=4, d_model=32, skip_every=2).double()
    tokens = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))
    want = model(tokens)
    with torch.no_grad():
        got, state = model.prefill(tokens[:, :13], logits="all")
        close(got, want[:, :13])
        state.save(tmp_path / "state.safetensors")
        state = model.reserve(State.load(tmp_path / "state.safetensors"), 20)
        for t in range(13, 30):
            got, state = model.step(tokens[:, t : t + 1], state)
            close(got, want[:, t : t + 1])
    assert {n.partition("passed")[1] for n in state.slots if n.startswith("1.")} == {"", "passed"}
    model.float().save(tmp_path / "model")
    assert torch.equal(ss.load(tmp_path / "model")(tokens), model(tokens))


def test_it_trains_towards_its_capacity():
    model = ss.language_model("gated_deltanet", n_layers=2, d_model=32, skip_every=2, skip_capacity=0.25)
    recipe = Recipe(tokens=32 * 16 * 60, batch_size=16, eval_tokens=64, lr=5e-3)
    points = list(Trainer(model, text_data(context=32), recipe).run())
    assert points[-1].validation < 5.0
    assert list(points[-1].experts) == ["1.0", "1.1"]
    assert all(0.05 < use["load"][0] < 0.6 for use in points[-1].experts.values())


def test_what_cannot_be_is_told():
    with pytest.raises(InputError, match="skip_every or share_kv"):
        ss.language_model("attention", n_layers=4, d_model=16, share_kv=2, skip_every=2)
