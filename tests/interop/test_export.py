"""Models that slipstream made, as families of transformers; and what is no family."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import slipstream as ss
from slipstream.core.errors import InputError
from slipstream.interop.hf.write import save_hf

from .theirs import close, in_pieces, tokens

SIZES = {"n_layers": 3, "d_model": 64, "vocab_size": 61}
GEMMA = {"norm": "rms_plus_one", "norm_place": "around", "embedding_scale": 8.0, "logit_cap": 30.0}
OURS = {
    "llama": ("attention(n_kv_heads=1, n_heads=2)", {}),
    "mistral": ("sliding_window(window=7)", {"tie_embeddings": False}),
    "qwen2": ("attention(qkv_bias=true, n_heads=4), sliding_window(qkv_bias=true, n_heads=4, window=5)", {}),
    "qwen3": ("attention(qk_norm=true, n_heads=2, head_dim=16)", {}),
    "gemma2": (
        "sliding_window(window=5, n_heads=2)/swiglu(activation=gelu_tanh), attention(n_heads=2)/swiglu(activation=gelu_tanh)",
        GEMMA,
    ),
    "mixtral": ("attention(n_heads=2, rope_scaling=linear:factor=2)/moe(n_experts=4)", {}),
    "olmo2": ("attention(qk_norm=whole, n_heads=2)", {"norm_place": "after"}),
}


def random_model(pattern, **settings):
    model = ss.language_model(pattern, **SIZES | settings).eval()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.15)
    return model


@pytest.mark.parametrize("family", OURS)
def test_what_slipstream_made_runs_in_transformers(family, tmp_path):
    pattern, settings = OURS[family]
    model, x = random_model(pattern, **settings), tokens(61)
    assert save_hf(model, tmp_path) == family
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        close(theirs(input_ids=x).logits, model(x))
        close(in_pieces(ss.load(tmp_path), x), model(x))


REFUSED = {
    "gated_deltanet": "gated_deltanet",
    "attention(conv_size=3)": "conv_size is 3, this family has 0",
    "attention(rope_base=none)": "rope_base none",
    "attention/none": "every block of this family",
    "attention(n_heads=2), attention(n_heads=4)": "layers differ in n_heads",
    "attention(rope_fraction=0.5)": "models of this family turn whole heads",
}


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_no_family_can_say_is_told(pattern, tmp_path):
    model = ss.language_model(pattern, **SIZES)
    with pytest.raises(InputError, match="no family of Hugging Face models is this model") as told:
        save_hf(model, tmp_path / "out", "llama")
    assert REFUSED[pattern] in str(told.value) and "--format slipstream" in str(told.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"norm": "layer"},
        {"embedding_norm": True},
        {"residual_scale": 0.5},
        {"head_bias": True, "tie_embeddings": False},
        {"logit_scale": 0.25},
        {"reversible": True},
        {"share_kv": 3},
    ],
    ids=lambda s: next(iter(s)),
)
def test_wiring_that_a_family_lacks_is_never_dropped(settings, tmp_path):
    with pytest.raises(InputError, match="no family"):
        save_hf(ss.language_model("attention", **SIZES | settings), tmp_path / "out")


def test_large_models_are_written_in_parts(tmp_path):
    model, x = random_model("attention(n_heads=2)"), tokens(61)
    save_hf(model, tmp_path, shard=60_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3 and all((tmp_path / f).is_file() for f in files)
    assert torch.equal(ss.load(tmp_path)(x), model(x))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        close(theirs(input_ids=x).logits, model(x))


def test_the_verb_writes_both_formats_and_says_what_cannot_be(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from slipstream.cli.app import app

    model, x = random_model("attention(n_heads=2)"), tokens(61)
    model.save(tmp_path / "run")

    def run(*arguments):
        return CliRunner().invoke(app, ["export", *map(str, arguments)])

    done = run(tmp_path / "run", "--out", tmp_path / "hf", "--json")
    assert json.loads(done.output) == {"out": str(tmp_path / "hf"), "format": "hf", "model_type": "llama"}
    assert run(tmp_path / "hf", "--format", "slipstream", "--out", tmp_path / "ours").exit_code == 0
    assert torch.equal(ss.load(tmp_path / "ours")(x), model(x))
    assert run(tmp_path / "run", "--dtype", "bfloat16", "--out", tmp_path / "half").exit_code == 0
    assert ss.load(tmp_path / "half").embedding.weight.dtype == torch.bfloat16
    for wrong, complaint in (
        (("--out", tmp_path / "x", "--format", "onnx"), "no format 'onnx'"),
        (("--out", tmp_path / "x", "--family", "lama"), "did you mean llama"),
        (("--out", tmp_path / "x", "--family", "qwen2"), "qkv_bias is False, this family has True"),
        (("--out", tmp_path / "run"), "write to another folder"),
    ):
        assert complaint in str(run(tmp_path / "run", *wrong).exception)
    assert not (tmp_path / "x").exists()
