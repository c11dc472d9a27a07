"""What to compare, and what is known so far."""

from __future__ import annotations

import json

import pytest

from slipstream.compare.config import EIGHT, CompareConfig
from slipstream.compare.results import Results
from slipstream.compare.run import command, slug
from slipstream.core.errors import InputError
from slipstream.models.archs import separate


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("lstm,attention", ["lstm", "attention"]),
        ("attention(n_heads=2, n_kv_heads=1), lstm", ["attention(n_heads=2, n_kv_heads=1)", "lstm"]),
        ("lstm; 3*gated_deltanet, attention", ["lstm", "3*gated_deltanet, attention"]),
        ("3*gated_deltanet, attention;", ["3*gated_deltanet, attention"]),
        (["lstm", "3*gated_deltanet, attention"], ["lstm", "3*gated_deltanet, attention"]),
    ],
)
def test_architectures_from_one_line(text, archs):
    assert separate(text) == archs
    assert CompareConfig(archs=text).archs == archs


def test_a_line_that_could_mean_two_things_is_refused():
    with pytest.raises(InputError, match="put ';' between architectures"):
        CompareConfig(archs="lstm, 3*gated_deltanet, attention")


def test_eight_different_architectures_are_the_default():
    assert len(set(CompareConfig().archs)) == len(EIGHT) == 8


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"archs": "mambba"}, "did you mean mamba"),
        ({"measure": "qualty"}, "choose from quality, recall, speed"),
        ({"params": "3X"}, "write a count"),
        ({"budget": "soon"}, "write a number with a unit"),
        ({"budjet": "5m"}, "did you mean budget"),
        ({"seeds": 0}, "seeds = 0"),
    ],
)
def test_mistakes_are_told(wrong, complaint):
    with pytest.raises(InputError, match=complaint):
        CompareConfig(**wrong)


def test_the_newest_record_of_each_counts_and_a_torn_line_is_left_out(tmp_path):
    results = Results(tmp_path)
    results.add({"kind": "quality", "arch": "lstm", "seed": 0, "val_bpb": 3.0})
    results.add({"kind": "quality", "arch": "lstm", "seed": 0, "val_bpb": 2.0})
    with open(results.lines, "a") as file:
        file.write('{"kind": "recall", "arch": "lst')  # a kill in mid-write
    results.add({"kind": "speed", "arch": "lstm"})
    assert [(r["kind"], r.get("val_bpb")) for r in results.records()] == [("quality", 2.0), ("speed", None)]
    assert results.has("quality", "lstm", 0) and not results.has("quality", "lstm", 1)


def test_other_settings_in_the_same_folder_are_refused_by_name(tmp_path):
    results = Results(tmp_path)
    results.agree(CompareConfig(params="1M").settings)
    results.agree(CompareConfig(params="1M", archs="lstm", seeds=3, jobs=1).settings)
    with pytest.raises(InputError, match="params was 1000000, is 2000000"):
        results.agree(CompareConfig(params="2M").settings)


def test_a_folder_belongs_to_one_comparison_at_a_time(tmp_path):
    with (
        Results(tmp_path).claimed(),
        pytest.raises(InputError, match="another comparison is running"),
        Results(tmp_path).claimed(),
    ):
        pass


def test_clearing_keeps_nothing_but_the_lock(tmp_path):
    results = Results(tmp_path)
    with results.claimed():
        results.add({"kind": "speed", "arch": "lstm"})
        (tmp_path / "models" / "lstm").mkdir(parents=True)
        results.clear()
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_folders_of_architectures_are_their_own():
    names = [
        "lstm",
        "3*gated_deltanet, attention",
        "2*gated_deltanet, attention",
        "attention(n_heads=2)",
        "attention(n_heads=4)",
    ]
    assert slug("lstm") == "lstm"
    assert len({slug(n) for n in names}) == len(names)
    assert all("/" not in slug(n) and " " not in slug(n) for n in names)


def test_the_command_repeats_the_comparison():
    config = CompareConfig(data="my book.txt", archs="lstm; 3*kda, attention", params="1M", measure="quality,speed")
    assert command(config) == (
        "slipstream compare 'my book.txt' --archs 'lstm; 3*kda, attention' --params 1000000 --measure quality,speed"
    )
    assert json.dumps(config.settings)
