"""The command line as a user meets it: facts as JSON, mistakes in one line with exit code 2, nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def run(*arguments, cwd=None):
    call = [sys.executable, "-m", "slipstream.cli.app", *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, timeout=300, check=False, cwd=cwd)


def test_list_and_show_tell_the_same():
    listed = {c["name"]: c for c in json.loads(run("list", "--json").stdout)}
    shown = json.loads(run("show", "gated_deltanet", "--d-model", "256", "--json").stdout)
    assert len(listed) >= 19
    assert shown["equation"] == listed["gated_deltanet"]["equation"]
    assert shown["sizes"]["state_bytes"]["512"] == shown["sizes"]["state_bytes"]["131072"] > 0


def test_check_proves_a_mixer_and_finds_a_broken_one(tmp_path):
    assert run("new-mixer", "my_rule", "--like", "linear_transformer", cwd=tmp_path).returncode == 0
    sound = run("check", "my_rule.py", cwd=tmp_path)
    assert sound.returncode == 0 and "broken" not in sound.stdout, sound.stdout
    file = tmp_path / "my_rule.py"
    source = file.read_text()
    assert "scale" not in source.split("def reference")[1].split("def ")[0]
    file.write_text(
        source.replace(
            'def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:',
            "def reference(self, x):\n        x = 1.001 * x",
            1,
        )
    )
    broken = run("check", "my_rule.py", cwd=tmp_path)
    assert broken.returncode == 1 and "broken" in broken.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["show", "mambaa"], "did you mean"),
        (["list", "--family", "deltas"], "did you mean delta"),
        (["train", "--arch", "atention"], "did you mean attention"),
        (["train", "nowhere.txt"], "no file nowhere.txt"),
        (["compare", "--archs", "lstm, 2*mamba, attention"], "put ';' between architectures"),
        (["compare", "--set", "budjet=3"], "did you mean budget"),
        (["compare", "-c", "nowhere.yaml"], "no settings file nowhere.yaml"),
        (["generate", "nowhere", "x"], "no model in nowhere"),
        (["new-mixer", "Attention"], "no registry name"),
        (["bench", "--archs", "lstmm"], "did you mean lstm"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, complaint, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert complaint in done.stderr and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"", "empty"), (b"short", "too short"), (bytes(range(256)) * 40, "byte")],
    ids=["empty", "short", "binary"],
)
def test_data_that_cannot_be_used(content, complaint, tmp_path):
    (tmp_path / "book.txt").write_bytes(content)
    for verb in ("train", "compare"):
        done = run(verb, "book.txt", cwd=tmp_path)
        assert done.returncode == 2 and complaint in done.stderr and "book" in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1


def test_settings_are_the_same_on_every_way_in(tmp_path):
    printed = run("compare", "--params", "1M", "--archs", "lstm; 3*kda, attention", "--print-config").stdout
    (tmp_path / "mine.yaml").write_text(printed)
    again = run("compare", "-c", tmp_path / "mine.yaml", "--print-config").stdout
    by_pairs = run("compare", "--set", "params=1M", "--set", "archs=lstm; 3*kda, attention", "--print-config").stdout
    assert "params: 1000000" in printed and printed == again == by_pairs
