"""slipstream quantise, on a run that slipstream train made, and generation from what it gives."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from slipstream.cli import generate, quantise
from slipstream.core.errors import InputError
from slipstream.data.tokenizer import byte_tokenizer
from slipstream.models.language_model import language_model
from slipstream.train.config import TrainConfig
from slipstream.train.run import train

TEXT = "It is a truth universally acknowledged, that a quick brown fox must be in want of a lazy dog. "


def call(*arguments: object, fails: bool = False) -> str:
    app = typer.Typer()
    for verb in (quantise, generate):
        verb.add(app)
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if fails:
        assert isinstance(result.exception, InputError), result.output
        return str(result.exception)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "book.txt").write_text(TEXT * 60)
    settings = {"n_layers": 1, "d_model": 64, "context": 32, "tokens": 4000, "tokenizer": "bpe:300"}
    train(TrainConfig(data=str(folder / "book.txt"), out=folder / "book", arch="attention", **settings))
    return folder / "book"


@pytest.fixture
def untrained(tmp_path):
    made = language_model("attention", n_layers=1, d_model=64)
    made.tokenizer = byte_tokenizer()
    made.save(tmp_path / "untrained")
    return tmp_path / "untrained"


def test_a_run_is_measured_on_what_it_held_out(run, tmp_path):
    told = json.loads(call("quantise", run, "--to", "int8", "--out", tmp_path / "small", "--json"))
    assert told["bytes"]["before"] > 3 * told["bytes"]["after"]
    stored = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert abs(stored - told["bytes"]["after"]) < 5000
    bits, metrics = told["bits_per_byte"], (run / "metrics.jsonl").read_text().splitlines()
    assert abs(bits["before"] - json.loads(metrics[-1])["validation"]) < 0.05
    assert abs(bits["after"] - bits["before"]) < 0.05 and told["nats_per_token"]["before"] > 0
    assert told["to"] == "int8" and told["group"] == 32 and told["tokens_read"] > 0


def test_what_it_writes_generates_and_carries_its_tokenizer(run, tmp_path):
    said = call("quantise", run, "--to", "int4", "--out", tmp_path / "small")
    assert "times smaller" in said and "bits per byte before" in said and f"slipstream generate {tmp_path}" in said
    text = call("generate", tmp_path / "small", "It is", "--max-new-tokens", 5, "--seed", 1)
    assert text == call("generate", run, "It is", "--max-new-tokens", 5, "--seed", 1, "--quantise", "int4")


def test_a_text_of_ones_own(untrained, tmp_path):
    (tmp_path / "other.txt").write_text(TEXT)
    told = json.loads(
        call("quantise", untrained, "--out", tmp_path / "a", "--text", tmp_path / "other.txt", "--group", 64, "--json")
    )
    assert 6 < told["bits_per_byte"]["before"] < 10 and told["tokens_read"] == len(TEXT) - 1


def test_without_a_text_it_says_what_is_not_known(untrained, tmp_path):
    assert "give --text FILE" in call("quantise", untrained, "--out", tmp_path / "a")
    told = json.loads(call("quantise", untrained, "--out", tmp_path / "b", "--json"))
    assert "bits_per_byte" not in told and told["bytes"]["after"] > 0


def test_settings_can_be_printed(untrained, tmp_path):
    printed = call("quantise", untrained, "--to", "int4", "--out", tmp_path / "a", "--print-config")
    assert "to: int4" in printed and "group: 32" in printed and not (tmp_path / "a").exists()


def test_mistakes(untrained, tmp_path):
    assert "needs a value for 'out'" in call("quantise", untrained, fails=True)
    assert "int3" in call("quantise", untrained, "--to", "int3", "--out", tmp_path / "a", fails=True)
    assert "groups of 32" in call(
        "quantise", untrained, "--to", "int4", "--group", 64, "--out", tmp_path / "a", fails=True
    )
    assert "no model in" in call("quantise", tmp_path / "nowhere", "--out", tmp_path / "a", fails=True)
    assert "choose another --out" in call("quantise", untrained, "--out", untrained, fails=True)
    assert "no file" in call("quantise", untrained, "--out", tmp_path / "a", "--text", tmp_path / "no.txt", fails=True)
    assert not (tmp_path / "a").exists()
    call("quantise", untrained, "--out", tmp_path / "small")
    assert "int8 already" in call("quantise", tmp_path / "small", "--out", tmp_path / "a", fails=True)
    assert "int8 already" in call("generate", tmp_path / "small", "x", "--quantise", "int4", fails=True)
