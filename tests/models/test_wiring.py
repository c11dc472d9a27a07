"""How layers are joined, in families other than ours: every setting in all three modes, and with reversible layers."""

from __future__ import annotations

import pytest
import torch

import slipstream as ss
from slipstream.core.errors import InputError
from slipstream.models.pattern import layers, parse, period, written

WIRING = [
    {"norm": "rms_plus_one", "norm_place": "around", "embedding_scale": 5.0, "logit_cap": 2.0},
    {"norm": "layer", "norm_place": "after", "embedding_norm": True, "head_bias": True, "tie_embeddings": False},
    {"norm": "layer_no_bias", "residual_scale": 0.3, "logit_scale": 0.25},
]
PLACES = [
    {"norm": "rms", "norm_place": "after_attention"},
    {"norm": "layer", "norm_place": "stream", "carry_scale": 1.7, "residual_scale": 0.4},
]


def model(**settings):
    made = (
        ss.language_model("gru, attention(n_heads=2)", n_layers=3, d_model=16, vocab_size=29, **settings)
        .double()
        .eval()
    )
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.2)
    return made


@pytest.fixture
def tokens():
    return torch.randint(0, 29, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("settings", [*WIRING, *PLACES], ids=lambda s: s["norm"])
def test_three_modes_agree_and_checkpoints_keep_it(settings, tokens, tmp_path):
    made = model(**settings)
    want = made(tokens)
    first, state = made.prefill(tokens[:, :6], logits="all")
    rest, state = made.prefill(tokens[:, 6:10], state, logits="all")
    last, _ = made.step(tokens[:, 10:], made.reserve(state, 1))
    torch.testing.assert_close(torch.cat([first, rest, last], 1), want, rtol=1e-10, atol=1e-10)
    made.save(tmp_path)
    assert torch.equal(ss.load(tmp_path)(tokens), want)


@pytest.mark.parametrize("name", [n for settings in WIRING for n in settings if n not in ("norm", "tie_embeddings")])
def test_every_setting_does_something(name, tokens):
    settings = next(s for s in WIRING if name in s)
    changed, plain = model(**settings), model(**{n: v for n, v in settings.items() if n != name})
    plain.load_state_dict({n: t for n, t in changed.state_dict().items() if n in plain.state_dict()}, strict=False)
    assert (changed(tokens) - plain(tokens)).abs().max() > 1e-3


def test_norms_stand_after_attention_and_before_all_others():
    blocks = model(norm_place="after_attention").stack.blocks
    assert [[len(list(norm.parameters())) for norm in block.norms] for block in blocks] == [[1, 1], [0, 0], [1, 1]]
    assert [[len(list(norm.parameters())) for norm in block.out_norms] for block in blocks] == [[0, 0], [1, 1], [0, 0]]


def test_a_stream_that_is_normed_itself(tokens):
    """Every norm is of the stream, and what is carried on is the normed one, by its factor."""
    made = model(norm_place="stream", carry_scale=1.7, residual_scale=0.4)
    h = made.embedding(tokens)
    for place in made.stack.places():
        normed = place.norm(h)
        h = 1.7 * normed + 0.4 * place.mixer(normed)
    torch.testing.assert_close(made(tokens), made.head(made.stack.norm(h)), rtol=1e-12, atol=1e-12)
    with pytest.raises(InputError, match="reversible"):
        model(norm_place="stream", reversible=True)


@pytest.mark.parametrize("settings", WIRING, ids=lambda s: s["norm"])
def test_reversible_layers_have_the_same_norms(settings, tokens):
    made = model(reversible=True, **settings)
    made(tokens).square().sum().backward()
    found = {n: p.grad for n, p in made.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in found.values())
    with torch.no_grad():
        want = made(tokens)
    torch.testing.assert_close(made(tokens), want, rtol=1e-10, atol=1e-10)
    name = "stack.blocks.1.mixers.1.down_proj.weight"
    weight = dict(made.named_parameters())[name]
    step = torch.zeros_like(weight)
    step[0, 0] = 1e-6
    with torch.no_grad():
        up = (weight.add_(step), made(tokens).square().sum())[1]
        down = (weight.sub_(2 * step), made(tokens).square().sum())[1]
    torch.testing.assert_close((up - down) / 2e-6, found[name][0, 0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "pattern",
    [
        "attention",
        "2*gru, attention(n_kv_heads=1)/mlp(d_ff=8)",
        "mamba/none, gru",
        "attention(rope_base=none, sinks=true)",
    ],
)
def test_a_pattern_can_be_written_again(pattern):
    blocks = layers(pattern, 12)
    assert parse(written(period(blocks))) == parse(pattern)
