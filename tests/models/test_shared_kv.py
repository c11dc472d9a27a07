"""Layers that read the keys and values of an earlier one: one cache for several, the same function in every mode."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import silu

import slipstream as ss
from slipstream.core.errors import InputError
from slipstream.core.state import State
from slipstream.layers.rope import rope
from slipstream.models.pattern import layers
from slipstream.models.sharing import lenders, with_shared
from slipstream.models.sizing import n_parameters, sized

MODELS = {  # pattern, n_layers, share_kv
    "cla2": ("attention(n_heads=4, n_kv_heads=2)", 4, 2),
    "cla3, uneven": ("attention(n_heads=4, n_kv_heads=1)/mlp", 5, 3),
    "yoco": ("2*sliding_window(window=6), 2*attention(n_heads=2, conv_size=3)", 4, 2),
    "hybrid": ("gated_deltanet(n_heads=2), attention/none", 6, 100),
    "all settings": (
        "attention(n_heads=2, head_dim=12, qk_norm=true, qkv_bias=true, softcap=5.0, sinks=true, gated=true)",
        3,
        3,
    ),
    "windows": (
        "sliding_window(window=6), attention, 2*sliding_window(window=6, own_kv=false), attention(own_kv=false)",
        5,
        1,
    ),
    "windows, all settings": (
        "sliding_window(window=4, n_heads=2, conv_size=3, qk_norm=true, softcap=5.0, sinks=true, gated=true), "
        "sliding_window(window=4, n_heads=2, conv_size=3, qk_norm=true, softcap=5.0, sinks=true, gated=true, own_kv=false)/none",
        2,
        1,
    ),
    "by the pattern": ("attention(qk_norm=true), attention(qk_norm=true, own_kv=false)/none", 4, 1),
}


def model_of(name, **kw):
    pattern, n_layers, share_kv = MODELS[name]
    return ss.language_model(pattern, n_layers=n_layers, d_model=32, vocab_size=50, share_kv=share_kv, **kw).double()


@pytest.fixture
def tokens():
    return torch.randint(0, 50, (2, 21), generator=torch.Generator().manual_seed(0))


def by_hand(model, tokens):
    """Attention layers and swiglu written out, with one T x T matrix a head; keys and values of the last layer that has some."""
    h = model.embedding(tokens)
    for block in model.stack.blocks:
        for norm, mixer in zip(block.norms, block.mixers):
            x, w = norm(h), dict(mixer.named_parameters())
            if "o_proj.weight" in w:
                H, at = mixer.qkv.n_heads, torch.arange(x.shape[1]).expand(len(x), -1)
                q = rope((x @ w["qkv.q_proj.weight"].T).unflatten(-1, (H, -1)), at)
                if "qkv.k_proj.weight" in w:
                    k, v = ((x @ w[f"qkv.{n}_proj.weight"].T).unflatten(-1, (-1, q.shape[-1])) for n in "kv")
                    k, v = (t.repeat_interleave(H // t.shape[2], 2) for t in (rope(k, at), v))
                logits = torch.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
                hidden = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
                o = torch.einsum("bhts,bshv->bthv", logits.masked_fill(hidden, -torch.inf).softmax(-1), v)
                h = h + o.flatten(2) @ w["o_proj.weight"].T
            else:
                gate, up = x @ w["gate_proj.weight"].T, x @ w["up_proj.weight"].T
                h = h + (silu(gate) * up) @ w["down_proj.weight"].T
    return model.head(model.stack.norm(h))


def test_forward_is_the_equation(tokens):
    model = model_of("cla2")
    torch.testing.assert_close(model(tokens), by_hand(model, tokens), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("room", [0, 21])
def test_any_cut_and_steps_are_forward(name, room, tokens):
    model = model_of(name)
    want, state, got = model(tokens), model.init_state(2, room), []
    for piece in tokens[:, :16].split([1, 7, 0, 8], 1):
        logits, state = model.prefill(piece, state, logits="all")
        got.append(logits)
    state = model.reserve(state, 5)
    with torch.no_grad():
        for t in range(16, 21):
            logits, state = model.step(tokens[:, t : t + 1], state)
            got.append(logits)
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-10, atol=1e-10)
    assert state.length.tolist() == [21, 21]


@pytest.mark.parametrize("name", MODELS)
def test_ragged_rows(name, tokens):
    model = model_of(name)
    lengths, more = torch.tensor([13, 5]), tokens[:, :4]
    _, state = model.prefill(tokens, lengths=lengths)
    got, state = model.prefill(more, state, logits="all")
    for b, n in enumerate(lengths):
        want = model(torch.cat([tokens[b, :n], more[b]])[None])[0, n:]
        torch.testing.assert_close(got[b], want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents(name, tokens):
    model, row, bounds = model_of(name), tokens.reshape(1, -1), [0, 5, 6, 21, 21, 42]
    alone = [model(row[:, a:b]) for a, b in pairwise(bounds)]
    torch.testing.assert_close(model(row, torch.tensor(bounds)), torch.cat(alone, 1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_flow_to_the_lender_in_every_mode(name, tokens):
    model = model_of(name)

    def gradients(logits):
        model.zero_grad()
        (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    want = gradients(model(tokens))
    a, state = model.prefill(tokens[:, :9], logits="all")
    b, _ = model.prefill(tokens[:, 9:], state, logits="all")
    got = gradients(torch.cat([a, b], 1))
    for n in want:
        torch.testing.assert_close(got[n], want[n], rtol=1e-10, atol=1e-10)
    if name == "cla2":
        by_autograd = gradients(by_hand(model, tokens))
        for n in want:
            torch.testing.assert_close(want[n], by_autograd[n], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("pattern", "n_layers", "share_kv", "caches"),
    [("attention", 4, 2, 2), ("attention", 5, 2, 3), ("attention", 4, 100, 1), ("3*lstm, attention", 8, 2, 1)],
)
def test_the_state_holds_one_cache_for_all_that_share(pattern, n_layers, share_kv, caches, tokens):
    def build(share_kv):
        return ss.language_model(pattern, n_layers=n_layers, d_model=32, vocab_size=50, share_kv=share_kv)

    shared, plain = build(share_kv), build(1)
    one, layers_ = 2 * 32 * 4 * 21, sum(m.name == "attention" for m in plain.stack.mixers())
    assert plain.state_bytes(21) - shared.state_bytes(21) == (layers_ - caches) * one
    for state in (shared.init_state(2, 21), shared.prefill(tokens)[1]):
        assert state.nbytes == 2 * shared.state_bytes(21)
        assert sum(n.endswith(".k") for n in state.slots) == caches
    weights = [n for n, _ in shared.named_parameters()]
    assert sum("k_proj" in n for n in weights) == sum("v_proj" in n for n in weights) == caches
    assert sum("q_proj" in n for n in weights if "lstm" not in n) == layers_
    assert plain.n_parameters() - shared.n_parameters() == (layers_ - caches) * 2 * 32 * 32


def test_a_window_that_is_shared_is_kept_once():
    pattern, n_layers, _ = MODELS["windows"]
    shared = ss.language_model(pattern, n_layers=n_layers, d_model=32, vocab_size=50)
    plain = ss.language_model(
        pattern.replace(", own_kv=false", "").replace("(own_kv=false)", ""), n_layers=5, d_model=32
    )
    a_window, a_cache = 2 * 32 * 4 * 5, 2 * 32 * 4 * 40
    assert plain.state_bytes(40) - shared.state_bytes(40) == 2 * a_window + a_cache


def test_states_are_cloned_chosen_joined_and_stored_as_any(tmp_path, tokens):
    model, rest = model_of("yoco"), slice(9, None)
    want = model(tokens)[:, rest]
    _, state = model.prefill(tokens[:, :9])
    order = torch.tensor([1, 0])
    swapped = model.prefill(tokens[order, rest], state.clone().rows(order), logits="all")[0]
    torch.testing.assert_close(swapped, want[order], rtol=1e-10, atol=1e-10)
    alone = [model.prefill(tokens[b : b + 1, :9], model.init_state(1, 9 + 3 * b))[1] for b in range(2)]
    joined = model.prefill(tokens[:, rest], State.cat(alone), logits="all")[0]
    torch.testing.assert_close(joined, want, rtol=1e-10, atol=1e-10)
    state.save(tmp_path / "state.safetensors")
    loaded = model.prefill(tokens[:, rest], State.load(tmp_path / "state.safetensors"), logits="all")[0]
    torch.testing.assert_close(loaded, want, rtol=1e-10, atol=1e-10)


def test_a_checkpoint_carries_it(tmp_path, tokens):
    model = model_of("cla2").float()
    model.save(tmp_path)
    assert torch.equal(ss.load(tmp_path)(tokens), model(tokens))


def test_models_are_sized_with_it():
    config = sized("attention", 1_000_000, 256, None, None, share_kv=2)
    assert config.share_kv == 2
    assert abs(n_parameters(config) - 1_000_000) <= 20_000
    assert (
        config.d_ff > sized("attention", 1_000_000, 256, None, None).d_ff
    )  # what sharing saves goes to the feed-forwards


def test_who_reads_whose():
    def table(pattern, n_layers, share_kv):
        return lenders(with_shared(layers(pattern, n_layers), share_kv))

    assert table("attention", 4, 1) == {}
    assert table("attention", 5, 2) == {"1.0": "0.0", "3.0": "2.0"}
    assert table("4*sliding_window, 4*attention", 8, 4) == {"5.0": "4.0", "6.0": "4.0", "7.0": "4.0"}
    assert table(MODELS["windows"][0], 5, 1) == {"2.0": "0.0", "3.0": "0.0", "4.0": "1.0"}
    assert table("mamba, attention", 6, 2) == {"3.0": "1.0"}
    assert table("attention/attention", 2, 2) == {"0.1": "0.0", "1.1": "1.0"}
    # only layers of one kind share: these have other heads
    assert table("attention, attention(n_kv_heads=1)", 4, 2) == {"2.0": "0.0", "3.0": "1.0"}
    assert table("attention, attention(n_kv_heads=1), attention(n_kv_heads=1)", 3, 2) == {"2.0": "1.0"}


@pytest.mark.parametrize(
    ("pattern", "share_kv", "complaint"),
    [
        ("gated_deltanet", 2, "share_kv 2 needs two layers with equal settings .*: attention"),
        ("3*gated_deltanet, attention", 2, "share_kv 2 needs two layers"),
        ("attention(own_kv=false), attention", 1, r"attention\(own_kv=false\) in block 0 has no attention before it"),
        ("attention(n_kv_heads=1), attention(own_kv=false)", 1, "with equal settings, to read from"),
        ("attention", 0, "share_kv"),
        ("attention(cache=h2o:64)", 2, "layers that share a cache read all of it"),
    ],
)
def test_what_cannot_share_is_told(pattern, share_kv, complaint):
    with pytest.raises(InputError, match=complaint):
        ss.language_model(pattern, n_layers=4, d_model=32, share_kv=share_kv)


def test_a_layer_that_borrows_runs_in_a_model_only():
    mixer = ss.mixer("attention", d_model=16, own_kv=False)
    x = torch.zeros(1, 3, 16)
    calls = (mixer, mixer.reference, lambda x: mixer.prefill(x, mixer.init_state(1)))
    for call in (*calls, lambda x: mixer.step(x[:, :1], mixer.init_state(1))):
        with pytest.raises(InputError, match="runs in a model only"):
            call(x)
    assert mixer.state_bytes(100) == 0
