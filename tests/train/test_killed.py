"""A run that is killed or stopped, then given again, ends with the same weights bit for bit as one that was left alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

STEPS = 18
OPTIONS = [
    "--arch",
    "attention(conv_size=4)",
    "--n-layers",
    "2",
    "--d-model",
    "16",
    "--context",
    "32",
    "--batch-size",
    "4",
    "--tokens",
    str(32 * 4 * STEPS),
    "--eval-every",
    "6",
    "--eval-tokens",
    "64",
    "--threads",
    "1",
    "--save-every",
    "0",
]
PROGRAM = """
import time
import typer
from slipstream.cli import train as verb
from slipstream.train import progress

class Aloud(progress.Screen):  # every step is told at once, and takes long enough to be killed in
    def __call__(self, event):
        super().__call__(event)
        print(getattr(event, "step", ""), flush=True)
        time.sleep(0.01)

progress.Screen = Aloud
app = typer.Typer()
verb.add(app)
app.callback()(lambda: None)
app()
"""


def start(out: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, "train", *OPTIONS, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stop_after(process: subprocess.Popen, step: int, how: signal.Signals) -> str:
    """Send the signal when the step was told; returns stderr."""
    for line in process.stdout:
        if line.strip() == str(step):
            process.send_signal(how)
            break
    return process.communicate(timeout=60)[1]


def finish(out: Path) -> str:
    process = start(out)
    told, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return told


def test_killed_and_stopped_runs_end_as_an_undisturbed_one(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    undisturbed = start(whole)
    process = start(broken)
    stop_after(process, 5, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    process = start(broken)
    errors = stop_after(process, 11, signal.SIGINT)
    assert process.returncode == 130, errors
    assert "saved at step" in errors
    told = finish(broken)
    assert undisturbed.communicate(timeout=120) and undisturbed.returncode == 0
    assert "slipstream generate" in told and "bits per byte" in told
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    assert {p.name for p in broken.iterdir()} == {p.name for p in whole.iterdir()}  # nothing half-written is left
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (whole, broken)]
    for a, b in zip(*lines, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    assert [line["step"] for line in lines[1]] == list(range(1, STEPS + 1))
