"""Layers that share more than a cache: one set of weights, what entered the stack, the first one's values; and words for the
next layer alone. Any cut of a text gives the same, as for all models."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import slipstream as ss
from slipstream.convert.quantise import quantise
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer
from slipstream.models.pattern import layers, parse, written
from slipstream.models.sharing import lenders, owners, with_shared
from slipstream.train.loop import _weights

TRANSFORMER = (
    "zamba2_transformer(n_heads=2, reads_embedding=true, adapter_rank=2, attention_adapters=true, {}to_next=true)"
)
ZAMBA = f"mamba2(n_heads=2)/none, {TRANSFORMER.format('tied=0, ')}/mamba2(n_heads=2)"
MODELS = {  # pattern, n_layers, further settings
    "zamba2": (ZAMBA, 6, {}),
    "zamba2, two in turns": (f"{ZAMBA}, {TRANSFORMER.format('tied=1, ')}/mamba2(n_heads=2)", 6, {}),
    "zamba2, norms around": (ZAMBA, 4, {"norm_place": "around", "norm": "layer", "residual_scale": 0.5}),
    "albert": ("attention(n_heads=2, tied=0)/swiglu(tied=0)", 3, {}),
    "albert, reversible": ("attention(n_heads=2, tied=0)/swiglu(tied=0)", 3, {"reversible": True}),
    "recurrent, tied": (
        "gated_deltanet(n_heads=2, tied=3)/mlp, rwkv7(n_heads=2, tied=0)/rwkv7_channel_mix(tied=1)",
        4,
        {},
    ),
    "rwkv7": ("rwkv7(n_heads=2)/rwkv7_channel_mix", 3, {"value_residual": True}),
    "rwkv7 in a hybrid": ("attention(n_heads=2), rwkv7(n_heads=2)", 6, {"value_residual": True, "share_kv": 2}),
    "rwkv7 by the pattern": ("rwkv7(n_heads=2), 2*rwkv7(n_heads=2, value_residual=true)/none", 6, {}),
}


def model_of(name):
    """With no parameter left where it hides what it is for."""
    pattern, n_layers, settings = MODELS[name]
    model = ss.language_model(pattern, n_layers=n_layers, d_model=32, vocab_size=50, **settings).double()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.1)
    return model


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.fixture
def tokens():
    return torch.randint(0, 50, (2, 21), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cuts", [(21,), (1, 20), (8, 0, 7, 6), (1,) * 21])
def test_any_cut_is_forward(name, cuts, tokens):
    model, got, state = model_of(name), [], None
    for piece in tokens.split(list(cuts), 1):
        logits, state = model.prefill(piece, state, logits="all")
        got.append(logits)
    same(torch.cat(got, 1), model(tokens))


@pytest.mark.parametrize("name", MODELS)
def test_steps_are_forward(name, tokens):
    model = model_of(name)
    with torch.no_grad():
        want, state, got = model(tokens), model.init_state(2, 21), []
        for t in range(21):
            logits, state = model.step(tokens[:, t : t + 1], state)
            got.append(logits)
    same(torch.cat(got, 1), want)


@pytest.mark.parametrize("name", MODELS)
def test_ragged_rows_and_packed_documents(name, tokens):
    model, lengths, more = model_of(name), torch.tensor([13, 5]), tokens[:, :4]
    _, state = model.prefill(tokens, lengths=lengths)
    got, _ = model.prefill(more, state, logits="all")
    for b, n in enumerate(lengths):
        same(got[b], model(torch.cat([tokens[b, :n], more[b]])[None])[0, n:])
    row, bounds = tokens.reshape(1, -1), [0, 5, 6, 21, 21, 42]
    alone = [model(row[:, a:b]) for a, b in pairwise(bounds)]
    same(model(row, torch.tensor(bounds)), torch.cat(alone, 1))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_any_cut(name, tokens):
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
        torch.testing.assert_close(got[n], want[n], rtol=1e-9, atol=1e-9)
        assert want[n].abs().max() > 0, n


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_keep_every_tensor_once(name, tokens, tmp_path):
    model = model_of(name).float()
    model.save(tmp_path)
    again = ss.load(tmp_path)
    assert torch.equal(again(tokens), model(tokens))
    assert sum(p.nbytes for p in model.parameters()) <= (tmp_path / "model.safetensors").stat().st_size
    assert (tmp_path / "model.safetensors").stat().st_size < sum(p.nbytes for p in model.parameters()) + 40_000
    assert again.n_parameters() == model.n_parameters() == sum(t.numel() for t in _weights(model).values())


def test_tied_layers_are_each_other_with_a_memory_of_their_own(tokens):
    model = model_of("albert")
    first, last = model.stack.blocks[0], model.stack.blocks[2]
    assert first.mixers[0].qkv is last.mixers[0].qkv and first.norms[1] is last.norms[1]
    single = ss.language_model(MODELS["albert"][0], n_layers=1, d_model=32, vocab_size=50)
    assert model.n_parameters() == single.n_parameters()
    assert model.state_bytes(10) == 3 * 2 * single.state_bytes(10)  # float64
    h = model.embedding(tokens)
    for _ in range(3):
        for norm, mixer in zip(first.norms, first.mixers):
            h = h + mixer(norm(h))
    same(model(tokens), model.head(model.stack.norm(h)))


def test_a_transformer_of_zamba2_is_the_equation(tokens):
    model = model_of("zamba2")
    h = e = model.embedding(tokens)
    for i, block in enumerate(model.stack.blocks):
        aside = block.mixers[0](block.norms[0](torch.cat([h, e], -1))) if i % 2 else 0
        h = h + block.mixers[-1](block.norms[-1](h + aside))
    same(model(tokens), model.head(model.stack.norm(h)))


def test_adapters_are_of_each_layer():
    blocks = model_of("zamba2").stack.blocks
    one, two = blocks[1].mixers[0], blocks[3].mixers[0]
    for name in one._modules:
        assert (getattr(one, name) is getattr(two, name)) == (name not in one.untied), name
    assert blocks[1].norms[0] is blocks[3].norms[0] and blocks[1].norms[1] is not blocks[3].norms[1]


def test_values_of_the_first_layer_matter(tokens):
    model = model_of("rwkv7")
    want = model(tokens)
    for block in list(model.stack.blocks)[1:]:
        block.mixers[0].v_lora.lora[2].bias.data.fill_(-1e3)  # none of them
    assert (model(tokens) - want).abs().max() > 1e-3


def test_quantised_models_share_too(tokens):
    model = model_of("zamba2").float()
    packed = quantise(model)
    one, two = (packed.stack.blocks[i].mixers[0] for i in (1, 3))
    assert one.qkv is two.qkv and one.o_proj is two.o_proj and one.linear is not two.linear
    assert packed.n_parameters() == model.n_parameters()


def test_patterns_are_written_as_they_are_read():
    for pattern, _, _ in MODELS.values():
        assert parse(written(parse(pattern))) == parse(pattern)


def test_who_has_whose():
    assert owners(layers("attention(tied=0), mamba2/swiglu(tied=0)", 4)) == {"2.0": "0.0", "3.1": "1.1"}
    assert owners(layers("mamba2(tied=0), gru(tied=0)", 2)) == {}
    residual = with_shared(layers("rwkv7, attention", 6), 1, True)
    assert lenders(residual) == {"2.0": "0.0", "4.0": "0.0"}


@pytest.mark.parametrize(
    ("pattern", "settings", "complaint"),
    [
        ("attention(tied=0), attention(tied=0, n_kv_heads=1)", {}, "give them equal settings"),
        ("attention(tied=yes)", {}, "tied in .* is yes, and must be a number"),
        ("attention(to_next=3)", {}, "must be true or false"),
        ("attention/swiglu(to_next=true)", {}, "the last of the model"),
        ("attention/moe(tied=0)", {}, "has experts, which layers cannot share"),
        ("attention(to_next=true)", {"reversible": True}, "need the plain stream"),
        ("attention(to_next=true)", {"norm_place": "stream"}, "need the plain stream"),
        ("attention(tied=0)", {"skip_every": 2}, "choose skip_every"),
        ("rwkv7(value_residual=true)", {}, r"rwkv7\(value_residual=true\) in block 0 has no rwkv7 before it"),
        ("attention", {"value_residual": True}, "value_residual true needs two layers .*: rwkv7"),
        ("rwkv7", {"value_residual": True, "reversible": True}, "choose reversible or"),
    ],
)
def test_what_cannot_be_is_told(pattern, settings, complaint):
    with pytest.raises(InputError, match=complaint):
        ss.language_model(pattern, n_layers=2, d_model=32, **settings)


def test_a_layer_that_needs_anothers_values_runs_in_a_model_only():
    mixer: Mixer = ss.mixer("rwkv7", d_model=16, n_heads=2, value_residual=True)
    with pytest.raises(InputError, match="runs in a model only"):
        mixer(torch.zeros(1, 3, 16))
