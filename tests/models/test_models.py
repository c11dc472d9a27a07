"""Models from pattern strings: pure, hybrid, sized, stored."""

from __future__ import annotations

import json

import pytest
import torch

import slipstream as ss
from slipstream.core.errors import InputError
from slipstream.models.pattern import layers, parse
from slipstream.models.sizing import n_parameters, sized


def tiny(pattern="2*sliding_window(window=6), attention", **kw):
    return ss.language_model(pattern, **({"n_layers": 3, "d_model": 32, "vocab_size": 50} | kw))


@pytest.fixture
def tokens():
    return torch.randint(0, 50, (2, 21), generator=torch.Generator().manual_seed(0))


def test_pattern_counts_settings_and_feedforward():
    blocks = parse("2*attention(n_kv_heads=1, rope_base=none)/mlp(d_ff=8), sliding_window/none")
    assert [[p.name for p in b.parts] for b in blocks] == [
        ["attention", "mlp"],
        ["attention", "mlp"],
        ["sliding_window"],
    ]
    assert blocks[0].parts[0].settings == {"n_kv_heads": 1, "rope_base": None}
    assert blocks[0].parts[1].settings == {"d_ff": 8}


def test_a_list_among_the_settings():
    (block,) = parse("longnet(segments=[8, 16], rates=[1, 2])/none")
    assert block.parts[0].settings == {"segments": [8, 16], "rates": [1, 2]}


def test_pattern_repeats_to_depth():
    names = [b.parts[0].name for b in layers("2*sliding_window, attention", 7)]
    assert names == ["sliding_window", "sliding_window", "attention"] * 2 + ["sliding_window"]


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        ("atention", "did you mean attention"),
        ("attention(n_head=2)", "did you mean n_heads"),
        ("attention,,lstm", "empty element"),
        ("", "empty element"),
        ("attention(", "cannot read"),
        ("attention/swigloo", "did you mean swiglu"),
        ("0*attention", "count from 1"),
        ("attention(n_heads)", "key=value"),
        ("attention(n_heads=[2)", r"cannot read '\[2'"),
        ("attention(d_model=3)", "no setting 'd_model'"),
    ],
)
def test_malformed_patterns_are_told(pattern, complaint):
    with pytest.raises(InputError, match=complaint):
        parse(pattern)


def test_a_pattern_longer_than_the_model():
    with pytest.raises(InputError, match="4 blocks long; n_layers 2"):
        layers("3*sliding_window, attention", 2)


def test_three_modes_agree(tokens):
    model = tiny().double()
    want = model(tokens)
    a, state = model.prefill(tokens[:, :8], logits="all")
    b, state = model.prefill(tokens[:, 8:19], state, logits="all")
    state = model.reserve(state, 2)
    c, state = model.step(tokens[:, 19:20], state)
    d, state = model.step(tokens[:, 20:], state)
    torch.testing.assert_close(torch.cat([a, b, c, d], 1), want, rtol=1e-10, atol=1e-10)
    assert state.length.tolist() == [21, 21]


def test_ragged_rows_give_each_its_last_logits(tokens):
    model = tiny().double()
    logits, state = model.prefill(tokens, lengths=torch.tensor([21, 9]))
    torch.testing.assert_close(logits[1], model(tokens[1:, :9])[0, -1:], rtol=1e-10, atol=1e-10)
    assert state.length.tolist() == [21, 9]


def test_a_long_prompt_is_read_in_pieces(monkeypatch, tokens):
    model = tiny().double()
    monkeypatch.setattr("slipstream.models.language_model.PIECE", 8)
    with torch.no_grad():
        for logits in ("last", None):
            got, state = model.prefill(tokens, logits=logits)
            want = model(tokens)[:, -1:] if logits else None
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
            assert state.length.tolist() == [21, 21]
        assert model.prefill(tokens[:, :0], logits=None)[1].length.tolist() == [0, 0]


def test_logits_are_given_as_asked(tokens):
    model = tiny()
    assert model.prefill(tokens)[0].shape == (2, 1, 50)
    assert model.prefill(tokens, logits="all")[0].shape == (2, 21, 50)
    assert model.prefill(tokens, logits=None)[0] is None


def test_packed_documents(tokens):
    model = tiny().double()
    packed = model(tokens.reshape(1, -1), torch.tensor([0, 21, 42]))
    torch.testing.assert_close(packed.reshape(2, 21, -1), model(tokens), rtol=1e-10, atol=1e-10)


def test_the_same_seed_gives_the_same_weights_and_leaves_torchs_alone():
    before = torch.random.get_rng_state()
    a, b, c = tiny(seed=1), tiny(seed=1), tiny(seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.embedding.weight, c.embedding.weight)


@pytest.mark.parametrize("params", [100_000, 1_000_000, 3_000_000, 30_000_000])
@pytest.mark.parametrize(
    "pattern", sorted(n for n, c in ss.mixers().items() if c.family != "feedforward" and not c.limits)
)
def test_models_are_sized_within_two_percent(pattern, params):
    config = sized(pattern, params, 256, None, None)
    assert abs(n_parameters(config) - params) <= 0.02 * params


def test_a_pattern_without_feedforward_is_sized_by_width():
    config = sized("attention/none", 1_000_000, 256, None, None)
    assert abs(n_parameters(config) - 1_000_000) <= 20_000


def test_an_impossible_size_says_what_is_near():
    with pytest.raises(InputError, match=r"nearest: [0-9]+ at d_model"):
        sized("attention", 1000, 50_000, None, None)


@pytest.mark.parametrize("name", sorted(n for n, c in ss.mixers().items() if c.limits))
def test_a_mixer_that_cannot_go_on_is_refused_with_its_reason(name):
    why = next(iter(ss.mixers()[name].limits.values()))
    for build in (lambda: tiny(f"attention, {name}"), lambda: ss.language_model(name, params="1M")):
        with pytest.raises(InputError, match=f"{name} cannot be part of a language model.*{why}"):
            build()


def test_weight_decay_spares_vectors(tokens):
    model = tiny()
    decay, spared = model.weight_decay_groups()
    assert len(decay) + len(spared) == len(list(model.parameters()))
    assert all(p.ndim > 1 for p in decay) and any(p.ndim == 1 for p in spared)


def test_a_checkpoint_is_a_hugging_face_directory(tmp_path, tokens):
    model = tiny()
    model.save(tmp_path / "m")
    about = json.loads((tmp_path / "m" / "config.json").read_text())
    assert about["model_type"] == "slipstream" and about["d_model"] == 32
    assert {p.name for p in (tmp_path / "m").iterdir()} == {
        "config.json",
        "model.safetensors",
        "generation_config.json",
    }
    for path in (tmp_path / "m", tmp_path / "m" / "model.safetensors"):
        assert torch.equal(ss.load(path)(tokens), model(tokens))


def test_bad_checkpoints_are_refused_in_one_line(tmp_path):
    tiny().save(tmp_path / "good")
    tiny("attention", n_layers=2).save(tmp_path / "other")
    with pytest.raises(InputError, match="did you mean good"):
        ss.load(tmp_path / "goood")
    weights = tmp_path / "good" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cut short"):
        ss.load(tmp_path / "good")
    weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match="another architecture"):
        ss.load(tmp_path / "good")
    weights.unlink()
    with pytest.raises(InputError, match="is missing"):
        ss.load(tmp_path / "good")
    (tmp_path / "good" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="lacks 'num_attention_heads'"):
        ss.load(tmp_path / "good")


def test_a_feed_forward_may_remember(tokens):
    """RWKV's channel mix sees the last token: a block's second mixer has a state like any other."""
    model = ss.language_model("rwkv6/rwkv_channel_mix", n_layers=2, d_model=16, vocab_size=64).double()
    want = model(tokens)
    first, state = model.prefill(tokens[:, :5], model.init_state(len(tokens)), logits="all")
    rest, _ = model.prefill(tokens[:, 5:], state, logits="all")
    torch.testing.assert_close(torch.cat([first, rest], 1), want)
