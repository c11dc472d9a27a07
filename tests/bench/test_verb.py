"""slipstream bench: its records as JSON lines, its tables, its folder, and mistakes in one line."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from slipstream.bench.config import BenchConfig
from slipstream.bench.run import run
from slipstream.cli.app import app
from slipstream.core.errors import InputError

SMALL = [
    "bench",
    "--archs",
    "lstm,attention",
    "--params",
    "100k",
    "--lengths",
    "8,16",
    "--contexts",
    "8",
    "--seconds",
    "0.5",
]


def test_records_come_as_json_lines_and_are_kept(tmp_path):
    said = CliRunner().invoke(app, [*SMALL, "--json", "--out", str(tmp_path)])
    assert said.exit_code == 0, said.output
    lines = [line for line in said.output.splitlines() if line.startswith("{")]
    records = [json.loads(line) for line in lines]
    assert {(r["kind"], r["arch"]) for r in records} == {
        (k, a) for k in ("speed", "state") for a in ("lstm", "attention")
    }
    assert (tmp_path / "results.jsonl").read_text().splitlines() == lines
    assert json.loads((tmp_path / "machine.json").read_text())["cores"] > 0


def test_tables_name_every_architecture():
    said = CliRunner().invoke(app, SMALL)
    assert said.exit_code == 0 and said.output.count("lstm") >= 2 and "tokens/s" in said.output


def test_standard_tasks_are_recorded_under_their_names():
    config = BenchConfig(archs="lstm", measure="mqar,copying", seconds=0.3)
    records = list(run(config))
    assert [r["kind"] for r in records] == ["mqar", "copying"]
    assert all(r["examples"] > 0 and 0 <= r["accuracy"] <= 1 and r["curve"] for r in records)


@pytest.mark.parametrize(
    ("field", "value"), [("measure", "sped"), ("archs", "mamb"), ("params", "many"), ("seconds", 0)]
)
def test_mistakes_are_told(field, value):
    with pytest.raises(InputError, match=field):
        BenchConfig(**{field: value})
