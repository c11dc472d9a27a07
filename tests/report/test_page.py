"""The page stands alone, is well formed, shows the records' numbers, and survives whatever is missing."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from slipstream.core.quantities import bytes_in_words, in_words
from slipstream.report.figures import loads_of_experts
from slipstream.report.page import write_report
from slipstream.report.summary import summarise
from slipstream.report.wording import digits
from tests.report.records import CURVES, comparison, of

VOID = {"meta", "link", "br", "path", "hr", "img", "input"}


class Page(HTMLParser):
    """Collects tags, the table's cells and the scripts; a tag closed out of order is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[tuple[str, bool]]] = []
        self.text: list[str] = []
        self.plots: dict = {}
        self.script_bytes = 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append(("", "best" in (dict(attrs).get("class") or "").split()))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            if self.tags[-1][1].get("id") == "plots":
                self.plots = json.loads(data)
            self.script_bytes += len(data)
            return
        if self.open and self.open[-1] == "style":
            return
        self.text.append(data)
        if "table" in self.open and self.rows and self.rows[-1]:
            cell, best = self.rows[-1][-1]
            self.rows[-1][-1] = (cell + data.strip(), best)

    def said(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.text))

    def row(self, arch: str) -> list[tuple[str, bool]]:
        return next(row for row in self.rows if row and row[0][0] == arch)


def written(records, tmp_path: Path) -> Page:
    path = tmp_path / "out" / "report.html"
    write_report(records, path)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]  # no temporary file is left
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return written(comparison(), tmp_path_factory.mktemp("page"))


@pytest.fixture(autouse=True)
def without_plotly(monkeypatch):
    """Plotly's code never varies: only the page that all tests share holds it."""
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "")


def test_nothing_is_fetched(page):
    urls = [
        v
        for _, attrs in page.tags
        for k, v in attrs.items()
        if k in ("src", "href", "action", "srcset", "poster", "data")
    ]
    assert urls == ["data:,"]
    assert not any(tag in ("iframe", "object", "embed", "a", "img") for tag, _ in page.tags)


def test_the_stylesheet_fetches_nothing():
    from slipstream.report.page import TEMPLATES

    assert not re.search(r"url\(|@import|https?:", (TEMPLATES / "report.css").read_text())


def test_the_table_shows_the_numbers_of_the_records(page):
    for arch in CURVES:
        _, quality, recall, speed, state = of(arch)
        cells = [text.removesuffix("(best)").strip() for text, _ in page.row(arch)]
        prefill, decode = ({n: v for n, v, _ in speed[key]} for key in ("prefill", "decode"))
        far = recall["distance"][-1]
        assert cells[1].startswith(digits(quality["val_bpb"]) + " ±")
        assert cells[2] == f"{100 * far['exact']:.1f} [{100 * far['low']:.1f}–{100 * far['high']:.1f}]"
        assert cells[3:7] == [in_words(speed["train"]), *(in_words(n / prefill[n]) for n in (512, 2048, 8192))]
        assert cells[7:] == [digits(decode[512]), digits(decode[8192]), bytes_in_words(dict(state["bytes"])[8192])]


def test_the_best_of_each_column_is_marked(page):
    marked = {arch: [i for i, (_, best) in enumerate(page.row(arch)) if best] for arch in CURVES}
    assert marked["tcn"] == [3, 4, 5, 6]
    assert marked["lstm"] == [7, 8, 9]
    assert marked["attention"] == [2]
    assert marked["gated_deltanet"] == [1, 2]
    assert marked["retnet"] == []


def test_headings_scopes_and_labels(page):
    assert [tag for tag, _ in page.tags if tag == "h1"] == ["h1"]
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.tags if tag == "th")
    plots = [attrs for tag, attrs in page.tags if attrs.get("class") == "plot"]
    assert len(plots) == 9
    assert all(p["role"] == "img" and "gated_deltanet" in (p["aria-label"] or "") for p in plots)
    assert {p["id"] for p in plots} == set(page.plots)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_plotly_is_inside(page):
    assert page.script_bytes > 1e6


def test_the_page_is_in_order(page):
    said = page.said()
    places = [
        said.index(words)
        for words in ("Verdict", "Which we would pick", "All numbers", "Figures", "How it was measured")
    ]
    assert places == sorted(places)
    assert "slipstream compare texts/middlemarch.txt --params 500k" in said
    assert "arXiv:1706.03762" in said


def test_figures_draw_the_records(page):
    state = {t["name"]: t for t in page.plots["state"]["traces"]}
    assert [[x, y] for x, y in zip(state["attention"]["x"], state["attention"]["y"])] == of("attention")[4]["bytes"]
    loss = {t["name"]: t for t in page.plots["loss-tokens"]["traces"]}
    assert loss["tcn"]["y"] == [p[2] for p in of("tcn")[1]["curve"]]
    colours = [
        {t["name"]: t["marker"]["color"] for t in plot["traces"]}
        for name, plot in page.plots.items()
        if name != "recall-examples"
    ]
    assert all(c == colours[0] for c in colours)  # an architecture looks the same everywhere
    looks = {(t["line"]["color"], t["line"]["dash"], t["marker"]["symbol"]) for t in loss.values()}
    assert len(looks) == len(CURVES)


def test_several_seeds_show_each_and_the_mean(tmp_path):
    page = written(comparison(2), tmp_path)
    lines = [t for t in page.plots["loss-tokens"]["traces"] if t["name"] == "tcn"]
    assert len(lines) == 3
    assert lines[2]["y"][0] == pytest.approx((lines[0]["y"][0] + lines[1]["y"][0]) / 2)


def test_names_are_escaped(tmp_path):
    records = comparison()
    records[0] = {**records[0], "data": "a <b> & <script>.txt", "command": "slipstream compare '</script><b>'"}
    records.append(
        {"kind": "quality", "arch": "<i>x</i>, attention", "val_bpb": 2.0, "curve": [[1, 1, 3.0], [2, 2, 2.0]]}
    )
    page = written(records, tmp_path)
    assert "Which architecture for a <b> & <script>.txt?" in page.said()
    assert "<i>x</i>, attention" in page.said()
    assert not any(tag == "i" for tag, _ in page.tags)


def test_without_records(tmp_path):
    page = written([], tmp_path)
    assert "Nothing has been measured yet." in page.said()
    assert page.plots == {}


def test_numbers_that_are_none_leave_gaps(tmp_path):
    records = comparison()
    for r in records:
        if r["kind"] == "quality" and r["arch"] == "tcn":
            r.update(val_bpb=float("nan"), diverged=True)
            r["curve"][-1][2] = float("inf")
    page = written(records, tmp_path)
    assert next(t for t in page.plots["loss-tokens"]["traces"] if t["name"] == "tcn")["y"][-1] is None
    assert "tcn: diverged in training (seed 0)." in page.said()
    assert page.row("tcn")[1][0] == "–"


@pytest.mark.parametrize("kind", ["setup", "model", "quality", "recall", "speed", "state"])
def test_a_kind_of_record_may_be_missing(kind, tmp_path):
    page = written([r for r in comparison() if r["kind"] != kind], tmp_path)
    assert len(page.row("mamba2")) > 1


@pytest.mark.parametrize("kind", ["setup", "model", "quality", "recall", "speed", "state"])
def test_a_kind_of_record_may_be_all_there_is(kind, tmp_path):
    written([r for r in comparison() if r["kind"] == kind], tmp_path)


def test_any_part_of_a_comparison_gives_a_page(tmp_path):
    everything, chance = comparison(2), random.Random(0)
    for _ in range(10):
        some = chance.sample(everything, chance.randrange(len(everything)))
        page = written(some, tmp_path)
        assert len(summarise(some).rows) == 0 or page.said()


def test_experts_get_a_figure_of_their_load(tmp_path):
    loads = [[1000 * i, {"0.1": [0.25, 0.25, 0.5, 0.0], "1.1": [0.4, 0.3, 0.2, 0.1]}] for i in range(1, 4)]
    records = [{**r, "experts": loads} if r["kind"] == "quality" and r["arch"] == "rwkv7" else r for r in comparison()]
    (figure,) = loads_of_experts(summarise(records))
    assert "rwkv7" in figure.question
    assert "layer 0.1: from 0 times its share to 2.00 times its share" in figure.alt
    (trace,) = figure.drawn
    assert len(trace["z"]) == len(trace["y"]) == 8 and trace["z"][2] == [2.0, 2.0, 2.0]
    assert figure.layout["yaxis"]["tickvals"] == [0, 4]
    assert not loads_of_experts(summarise(comparison()))
    write_report(records, tmp_path / "report.html")
    assert "Are the experts of rwkv7 evenly used?" in (tmp_path / "report.html").read_text()
