"""slipstream generate, on a run that slipstream train made."""

from __future__ import annotations

import io
import json
import sys

import pytest
import typer
from typer.testing import CliRunner

from slipstream.cli import generate as verb
from slipstream.core.errors import InputError
from slipstream.data.tokenizer import byte_tokenizer
from slipstream.models.language_model import language_model


@pytest.fixture
def run(tmp_path):
    made = language_model("attention", n_layers=1, d_model=16)
    made.tokenizer = byte_tokenizer()
    made.save(tmp_path / "book")
    return tmp_path / "book"


def call(*arguments: object, fails: bool = False) -> str:
    app = typer.Typer()
    verb.add(app)
    app.callback()(lambda: None)
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    if fails:
        assert isinstance(result.exception, InputError)
        return str(result.exception)
    assert result.exit_code == 0, result.output
    return result.stdout


def as_json(*arguments: object) -> dict:
    return json.loads(call(*arguments, "--json", "--seed", 3, "--temperature", 1.5))


def test_text_and_json_are_the_same(run):
    about = as_json(run, "Once upon", "--max-new-tokens", 30)
    plain = call(run, "Once upon", "--max-new-tokens", 30, "--seed", 3, "--temperature", 1.5)
    assert plain == about["text"] + "\n"
    assert (about["prompt"], about["tokens"], about["ended"], about["seed"]) == ("Once upon", 30, "length", 3)
    assert as_json(run / "model.safetensors", "Once upon", "--max-new-tokens", 30) == about


def test_save_and_continue(run, tmp_path):
    whole = as_json(run, "Once upon", "--max-new-tokens", 30)["text"]
    state = tmp_path / "read.safetensors"
    first = as_json(run, "Once upon", "--max-new-tokens", 12, "--save-state", state)["text"]
    assert first + as_json(run, "--from-state", state, "--max-new-tokens", 18)["text"] == whole


def test_stop_may_be_repeated(run):
    whole = as_json(run, "Once upon", "--max-new-tokens", 40)["text"]
    a, b = whole[20], whole[10]
    about = as_json(run, "Once upon", "--max-new-tokens", 40, "--stop", a, "--stop", b)
    assert about["text"] == whole[: min(whole.index(a), whole.index(b))]
    assert about["ended"] == "stop"


def test_standard_input(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Once upon")))
    app = typer.Typer()
    verb.add(app)
    app.callback()(lambda: None)
    result = CliRunner().invoke(app, ["generate", str(run), "-", "--json", "--max-new-tokens", "3"], input="Once upon")
    assert json.loads(result.stdout)["prompt"] == "Once upon"


def test_mistakes(run, tmp_path):
    assert "did you mean book" in call(tmp_path / "bok", "x", fails=True)
    assert "give a prompt" in call(run, fails=True)
    assert "did you mean" in call(run, "x", "--set", "temprature=1", fails=True)
    assert "no state file" in call(run, "--from-state", tmp_path / "none", fails=True)
