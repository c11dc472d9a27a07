"""README's first figure: all ten mixers, no label on another, the numbers those of the mixers."""

from __future__ import annotations

import importlib.util
import itertools
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

import slipstream as ss
from slipstream.core.quantities import bytes_in_words

SCRIPT = Path(__file__).parents[2] / "bench" / "state_figure.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("state_figure", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_shows_what_the_mixers_declare(script):
    svg = script.figure(script.lines())
    ET.fromstring(svg)
    for name, settings, label in script.DRAWN:
        with torch.device("meta"):
            size = ss.mixer(name, d_model=script.D_MODEL, **settings).state_bytes(script.LAST)
        assert f'{label}</tspan><tspan dx="6">{bytes_in_words(float(size))}</tspan>' in svg


def test_labels_keep_apart_and_inside(script):
    svg = script.figure(script.lines())
    heights = [float(y) for y in re.findall(r'y="([\d.]+)"><tspan', svg)]
    assert len(heights) == 10
    assert all(b - a > script.GAP - 0.2 for a, b in itertools.pairwise(heights))
    assert heights[0] > 0 and heights[-1] < script.HEIGHT


def test_a_mixer_that_is_not_there_is_left_out(script, monkeypatch):
    monkeypatch.setattr(script.ss, "mixers", lambda: {"lstm": type(ss.mixer("lstm", d_model=8))})
    assert [label for label, _, _ in script.lines()] == ["lstm"]
