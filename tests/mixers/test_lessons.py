"""Parts that only choose: their loss is the plain formula's, reaches nothing else, and makes them choose what attention reads."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

import slipstream as ss
from slipstream.core.auxiliary import Collector
from slipstream.models.language_model import language_model
from slipstream.ops import choice_loss as losses

B, T, D = 2, 33, 16
TAUGHT = {
    "dsa": {"n_heads": 2, "top_k": 5, "index_n_heads": 2, "index_head_dim": 6},
    "csa": {"n_heads": 2, "top_k": 3, "window": 5, "rate": 2, "index_n_heads": 2, "index_head_dim": 6},
    "seer_attention": {"n_heads": 4, "n_kv_heads": 2, "block_size": 4, "top_k": 3},
}
PART = {"dsa": "indexer", "csa": "indexer", "seer_attention": "attn_gate"}
each = pytest.mark.parametrize("name", TAUGHT)


def seeded(name: str, **config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = ss.mixer(name, d_model=D, **TAUGHT[name] | config).double()
        for p in mixer.parameters():
            p.data.add_(0.3 * torch.randn_like(p))
    return mixer


def line(tokens: int = T, seed: int = 1, rows: int = B) -> torch.Tensor:
    return torch.randn(rows, tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def heard(run) -> torch.Tensor:
    """The penalty of what is told while run() runs."""
    collector = Collector()
    with collector.listening():
        run()
    return collector.penalty()


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(masses, scores):
    p, q = masses / masses.sum(), softmax(scores)
    return float((p * (np.log(p) - np.log(q))).sum())


def arrays(*tensors):
    return [t.detach().numpy() for t in tensors]


def index_scores(a, w, b, row, t, n):
    return (w[row, t] @ np.maximum(a[row, t] @ b[row, :n].T, 0)) / np.sqrt(a.shape[2] * a.shape[3])


def dsa_loss(mixer, x):
    positions = torch.arange(x.shape[1]).expand(len(x), -1)
    low = mixer.latent.low_rank(x)
    q = torch.cat(mixer.latent.queries(low, positions), -1)
    k, _ = mixer.latent.expand(*mixer.latent.latents(x, positions))
    q, k, a, w, b = arrays(q, k, *mixer.indexer(x, low, positions))
    found = []
    for row in range(len(x)):
        for t in range(x.shape[1]):
            read = softmax(np.einsum("hk,shk->hs", q[row, t], k[row, : t + 1]) * mixer.latent.scale).sum(0)
            found.append(kl(read, index_scores(a, w, b, row, t, t + 1)))
    return np.mean(found)


def csa_loss(mixer, x):
    c, heads, index = mixer.config, mixer.heads, mixer.indexer
    positions = torch.arange(x.shape[1]).expand(len(x), -1)
    low = heads.low_rank(x)
    q, near, far = arrays(heads.queries(low, positions), heads.keys(x, positions), mixer.compressor.reference(x))
    a, w, b = arrays(index.queries(low, positions), index.weights_proj(x), index.compressor.reference(x)[:, :, 0])
    sinks, found = heads.sinks.detach().numpy()[:, None], []
    for row in range(len(x)):
        for t in range(x.shape[1]):
            n = (t + 1) // c.rate
            keys = np.concatenate([far[row, :n, 0], near[row, max(0, t + 1 - c.window) : t + 1, 0]])
            logits = q[row, t] @ keys.T / np.sqrt(heads.head_dim)
            read = softmax(np.concatenate([logits, sinks], 1)).sum(0)[:n]
            found.append(kl(read, index_scores(a, w, b, row, t, n)) if n else 0.0)
    return np.mean(found)


def seer_loss(mixer, x):
    gate, L = mixer.attn_gate, mixer.config.block_size
    q, k, _ = mixer.qkv.reference(x)
    positions = torch.arange(x.shape[1]).expand(len(x), -1)
    blocks = k[:, : x.shape[1] // L * L].unflatten(1, (-1, L))
    pooled = torch.cat([blocks.amax(2), blocks.amin(2), blocks.mean(2)], -1)
    a, b = arrays(gate.ask(q, positions), gate.answer(pooled, positions[:, : x.shape[1] // L]))
    q, k = arrays(gate.turn(q, positions), gate.turn(k, positions))
    found, K, group = [], q.shape[-1], q.shape[2] // k.shape[2]
    for row in range(len(x)):
        for t in range(x.shape[1]):
            for g in range(k.shape[2]):
                read = softmax(q[row, t, g * group : (g + 1) * group] @ k[row, : t + 1, g].T / np.sqrt(K))
                n = t // L
                most = np.array([read[:, i * L : (i + 1) * L].max() for i in range(n)])
                found.append(kl(most, b[row, :n, g] @ a[row, t, g] / np.sqrt(K)) if n else 0.0)
    return np.mean(found)


FORMULAS = {"dsa": dsa_loss, "csa": csa_loss, "seer_attention": seer_loss}


@each
@pytest.mark.parametrize("held", [2**22, 700])
def test_the_loss_is_the_plain_formula(name, held, monkeypatch):
    """In one tile of queries, and in tiles of a few."""
    monkeypatch.setattr(losses, "HELD", held)
    mixer, x = seeded(name), line()
    assert heard(lambda: mixer(x)).item() == pytest.approx(FORMULAS[name](mixer, x), rel=1e-10)


def test_it_is_the_plain_formula_with_low_rank_queries():
    for name in ("dsa", "csa"):
        mixer = seeded(name, q_rank=7)
        assert heard(lambda m=mixer: m(line())).item() == pytest.approx(FORMULAS[name](mixer, line()), rel=1e-10)


@each
def test_it_reaches_what_chooses_and_nothing_else_and_the_text_all_but_that(name):
    mixer, x = seeded(name), line().requires_grad_()
    collector = Collector()
    with collector.listening():
        y = mixer(x)
    names, parameters = zip(*mixer.named_parameters())
    chooses = [n.startswith(PART[name]) for n in names]
    assert [n.partition(".")[0] in mixer.no_gradient for n in names] == chooses
    by_lesson = torch.autograd.grad(collector.penalty(), [x, *parameters], allow_unused=True)
    by_text = torch.autograd.grad(y.square().sum(), [x, *parameters], allow_unused=True)
    assert by_lesson[0] is None and by_text[0] is not None
    for n, mine, lesson, text in zip(names, chooses, by_lesson[1:], by_text[1:]):
        assert (lesson is not None and lesson.abs().max() > 0) == mine, n
        assert (text is not None) != mine, n


@each
def test_nobody_is_told_without_a_collector_and_outputs_are_the_same_with_one(name):
    mixer, x = seeded(name), line()
    collector = Collector()
    with collector.listening():
        y = mixer(x)
    assert torch.equal(y, mixer(x))
    collector.penalty()
    assert list(collector.taught) == [mixer] and len(collector.taught[mixer]) == 1
    weight = "gate_loss" if name == "seer_attention" else "index_loss"
    half = heard(lambda: seeded(name, **{weight: 0.5})(x)).item()
    assert half == pytest.approx(0.5 * collector.taught[mixer][0].item())
    assert heard(lambda: seeded(name, **{weight: 0.0})(x)) == 0.0


@each
def test_gradients_do_not_depend_on_the_tiles(name, monkeypatch):
    grads = []
    for held in (2**22, 700):
        monkeypatch.setattr(losses, "HELD", held)
        mixer = seeded(name)
        heard(lambda m=mixer: m(line())).backward()
        grads.append([p.grad for n, p in mixer.named_parameters() if n.startswith(PART[name])])
    for one, many in zip(*grads):
        torch.testing.assert_close(many, one, rtol=1e-10, atol=1e-12)


@each
@pytest.mark.parametrize("garbage", [1e4, float("nan")])
def test_padding_teaches_nothing(name, garbage):
    """Right-padded rows weigh by their tokens, and what stands behind them reaches no gradient."""
    mixer, lengths = seeded(name), torch.tensor([T, 14])
    x = line()
    x[1, 14:] = garbage
    loss = heard(lambda: mixer.prefill(x, mixer.init_state(B, T), lengths))
    alone = [heard(lambda r=r, n=n: mixer(x[r : r + 1, :n])).item() for r, n in enumerate(lengths.tolist())]
    assert loss.item() == pytest.approx((alone[0] * T + alone[1] * 14) / (T + 14), rel=1e-10)
    loss.backward()
    assert all(p.grad.isfinite().all() for n, p in mixer.named_parameters() if n.startswith(PART[name]))


@each
def test_packed_documents_are_taught_one_by_one(name):
    mixer, x = seeded(name), line(rows=1)
    loss = heard(lambda: mixer(x, packed=torch.tensor([0, 20, T]))).item()
    alone = [heard(lambda r=r: mixer(x[:, r])).item() for r in (slice(0, 20), slice(20, T))]
    assert loss == pytest.approx((alone[0] * 20 + alone[1] * 13) / T, rel=1e-10)


@each
def test_a_text_that_goes_on_is_taught_behind_its_past(name):
    """Every cut, weighed by its tokens, gives the loss of the whole."""
    mixer, x, state, total = seeded(name), line(), None, 0.0
    state = mixer.init_state(B, T)
    for piece in x.split([10, 1, 22], 1):
        collector = Collector()
        with collector.listening(), torch.no_grad():
            _, state = mixer.prefill(piece, state)
        total += collector.penalty().item() * piece.shape[1] / T
    assert total == pytest.approx(heard(lambda: mixer(x)).item(), rel=1e-10)


@each
def test_nothing_to_read_is_no_loss(name):
    mixer = seeded(name)
    assert heard(lambda: mixer(line(0))) == 0
    assert heard(lambda: mixer(line(3)[:0])) == 0


@each
def test_large_inputs_give_finite_gradients(name):
    mixer = seeded(name).float()
    loss = heard(lambda: mixer(50 * line().float()))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for n, p in mixer.named_parameters() if n.startswith(PART[name]))


def overlap(mixer, x) -> float:
    """How much of all that full attention reads is read by what is chosen."""
    read, positions = [], torch.arange(x.shape[1]).expand(len(x), -1)
    low = mixer.latent.low_rank(x)
    q = torch.cat(mixer.latent.queries(low, positions), -1)
    k, _ = mixer.latent.expand(*mixer.latent.latents(x, positions))
    a, w, b = mixer.indexer(x, low, positions)
    for t in range(mixer.config.top_k, x.shape[1]):
        weights = (torch.einsum("bhk,bshk->bhs", q[:, t], k[:, : t + 1]) * mixer.latent.scale).softmax(-1).mean(1)
        scores = torch.einsum("bi,bis->bs", w[:, t], torch.einsum("bik,bsk->bis", a[:, t], b[:, : t + 1]).relu())
        read.append(weights.gather(1, scores.topk(mixer.config.top_k).indices).sum(1).mean().item())
    return float(np.mean(read))


def test_a_taught_indexer_chooses_what_attention_reads():
    mixer = seeded("dsa", top_k=4, index_n_heads=4, index_head_dim=16).float()
    with torch.no_grad():
        mixer.latent.q_proj.weight *= 4  # attention that looks at some tokens much more than at others
    held_out = line(seed=2).float()
    before = overlap(mixer, held_out)
    learner = torch.optim.Adam(mixer.indexer.parameters(), lr=1e-2)
    for step in range(150):
        learner.zero_grad()
        heard(partial(mixer, line(seed=10 + step, rows=4).float())).backward()
        learner.step()
    assert overlap(mixer, held_out) > before + 0.15


def test_lessons_pass_through_reversible_layers():
    model = language_model("dsa(top_k=4)", n_layers=2, d_model=D, reversible=True)
    penalty = heard(lambda: model(torch.arange(12)[None]))
    assert penalty > 0
    penalty.backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    assert reached and all("indexer" in n for n in reached)
