"""The machine's description: complete, and its rates are of the right kind."""

from __future__ import annotations

import json
import os

import torch
from typer.testing import CliRunner

from slipstream.bench import machine
from slipstream.cli.app import app
from slipstream.ops import dispatch


def test_facts_without_measuring_are_quick_and_plain():
    facts = machine.describe(measured=False)
    assert facts["cores"] == os.cpu_count() and facts["torch"] == torch.__version__
    assert all(isinstance(v, str | int | float) for v in facts.values())
    assert "read_gb_per_second" not in facts


def test_rates_are_those_of_the_work_that_was_timed(monkeypatch):
    monkeypatch.setattr(machine, "_best", lambda run: (run(), 0.5)[1])
    assert machine.read_rate(4096) == 8192
    assert machine.matmul_rate(8) == 2 * 8**3 / 0.5


def test_every_op_says_what_runs_it_and_why():
    listed = {row["op"]: row for row in machine.backends()}
    assert {"outer_scan", "delta_scan", "selective_scan", "linear_scan", "causal_conv"} <= set(listed)
    assert all(row["reading"] and row["training"] and row["why"] for row in listed.values())


def test_a_backend_for_reading_only_is_told(monkeypatch):
    fast = dispatch.Backend("fast", lambda call: not call.needs_grad, lambda *a: None)
    picky = dispatch.Backend("picky", lambda call: call.dtype == torch.float64, lambda *a: None)
    monkeypatch.setitem(dispatch.BACKENDS, "outer_scan", [fast])
    monkeypatch.setitem(dispatch.BACKENDS, "delta_scan", [picky])
    listed = {row["op"]: row for row in machine.backends()}
    assert (listed["outer_scan"]["reading"], listed["outer_scan"]["training"]) == ("fast", "torch")
    assert "without gradients" in listed["outer_scan"]["why"]
    assert listed["delta_scan"]["reading"] == "torch" and "picky does not take float32" in listed["delta_scan"]["why"]


def test_a_busy_machine_is_warned_of(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    assert "99.0" in machine.overloaded()
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert machine.overloaded() == ""


def test_doctor_prints_facts(monkeypatch):
    monkeypatch.setattr(machine, "_best", lambda run: 0.001)
    said = CliRunner().invoke(app, ["doctor", "--json"])
    assert said.exit_code == 0 and json.loads(said.stdout)["backends"]
    words = CliRunner().invoke(app, ["doctor"])
    assert words.exit_code == 0 and "GB/s" in words.stdout and "outer_scan" in words.stdout
