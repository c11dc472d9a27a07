"""Settings and cards: mistakes are told in one line with the nearest name; a name is declared once."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

import slipstream as ss
from slipstream.core import cards
from slipstream.core.errors import InputError
from slipstream.core.quantities import bytes_in_words, count, seconds


def test_unknown_mixer_names_the_nearest():
    with pytest.raises(InputError, match="did you mean attention"):
        ss.mixer("atention", d_model=64)


def test_unknown_setting_names_the_nearest():
    with pytest.raises(InputError, match="did you mean n_heads"):
        ss.mixer("attention", d_model=64, n_head=4)


def test_heads_that_do_not_divide():
    with pytest.raises(
        InputError, match=r"d_model 100 does not divide into n_heads 3; the nearest that do: \[1, 2, 4\]"
    ):
        ss.mixer("attention", d_model=100, n_heads=3)


def test_settings_are_frozen():
    with pytest.raises(InputError, match="d_ff = 0"):
        ss.mixer("swiglu", d_model=64, d_ff=0)
    config = ss.mixer("swiglu", d_model=64).config
    with pytest.raises(ValueError, match="frozen"):
        config.d_model = 3


@pytest.mark.parametrize(
    ("text", "value"), [("3M", 3_000_000), ("500k", 500_000), ("1e6", 1_000_000), (12, 12), ("2.5m", 2_500_000)]
)
def test_counts(text, value):
    assert count(text) == value


@pytest.mark.parametrize(("text", "value"), [("5m", 300), ("90s", 90), ("1.5h", 5400), (7, 7)])
def test_seconds(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["3X", "many", "", "-3M"])
def test_malformed_counts_are_refused(text):
    with pytest.raises(ValueError, match="write"):
        count(text)


def test_bytes_in_words():
    assert [bytes_in_words(n) for n in (12, 2048, 3 * 2**20)] == ["12 B", "2 KiB", "3 MiB"]


def test_a_name_declared_twice_names_both_files(tmp_path):
    source = cards.card("swiglu").path.read_text()
    (tmp_path / "again.py").write_text(source)
    with pytest.raises(InputError, match=r"declared twice: .*swiglu\.py and .*again\.py"):
        cards.from_file(tmp_path / "again.py")


def test_a_mixer_in_a_file_of_ones_own_is_found(tmp_path):
    source = cards.card("swiglu").path.read_text().replace('name="swiglu"', 'name="my_glu"').replace("SwiGLU", "MyGLU")
    (tmp_path / "my_glu.py").write_text(source)
    program = (
        "from pathlib import Path; from slipstream.core.cards import from_file; import slipstream as ss\n"
        f"from_file(Path({str(tmp_path / 'my_glu.py')!r})); print(type(ss.mixer('my_glu', d_model=16)).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "MyGLU"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["list"],
        ["list", "--json"],
        ["train", "--help"],
        ["compare", "--archs", "mambba"],
        ["train", "--arch", "attention(n_head=2)"],
        ["train", "--parms", "3M"],
    ],
)
def test_quick_answers_do_not_import_torch(arguments):
    program = (
        f"import sys; sys.argv[1:] = {arguments!r}\nfrom slipstream.cli.app import main\n"
        "try: main()\nexcept SystemExit as e: print('exit', e.code, file=sys.stderr)\n"
        "assert 'torch' not in sys.modules"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    )  # of CPU: wall time is shared with others
