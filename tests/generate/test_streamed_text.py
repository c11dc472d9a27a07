"""Whole characters, and stop strings however the text is cut."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.data.tokenizer import byte_tokenizer, train_bpe
from slipstream.generate.text import Characters, StopStrings

TOKENIZER = byte_tokenizer()
LETTERS = st.text(alphabet="abc\n", max_size=30)


def cut(text: str, points: list[int]) -> list[str]:
    """The text in pieces, cut at these places."""
    edges = sorted({0, len(text), *(p % (len(text) + 1) for p in points)})
    return [text[a:b] for a, b in pairwise(edges)]


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """Letter by letter: the first place where a stop is complete, and the longest stop that ends there."""
    for end in range(1, len(text) + 1):
        if ending := [s for s in stops if text[:end].endswith(s)]:
            return text[: end - max(map(len, ending))], True
    return text, False


STOPS = st.lists(st.text(alphabet="abc\n", min_size=1, max_size=4), max_size=3)


@given(text=LETTERS, stops=STOPS, points=st.lists(st.integers(0, 99)))
@settings(max_examples=400, deadline=None)
def test_stop_strings_end_the_text_at_the_same_place_for_every_cut(text, stops, points):
    waiting, shown = StopStrings(stops), ""
    want, ends = expected(text, stops)
    for piece in cut(text, points):
        shown += waiting.feed(piece)
        assert want.startswith(shown)  # nothing of a stop string ever leaks
        if waiting.ended:
            break
    assert waiting.ended == ends
    assert shown + waiting.flush() == want


def test_only_what_may_begin_a_stop_string_is_held_back():
    waiting = StopStrings(["\n\n", "END"])
    assert waiting.feed("one E") == "one "
    assert waiting.feed("x\n") == "Ex"
    assert waiting.feed("two") == "\ntwo"
    assert waiting.feed("EN") == ""
    assert waiting.feed("D of") == ""
    assert waiting.ended


@given(text=st.text(min_size=1, max_size=40))
@settings(max_examples=150, deadline=None)
def test_characters_come_whole_and_in_full(text):
    characters = Characters(TOKENIZER)
    pieces = [characters.feed(t) for t in text.encode()]
    assert "".join(pieces) == text
    assert characters.held == []


@given(text=st.text(min_size=2, max_size=30), at=st.integers(1, 200))
@settings(max_examples=150, deadline=None)
def test_a_character_cut_by_a_break_is_shown_after_it(text, at):
    raw = text.encode()
    at = at % len(raw)
    first = Characters(TOKENIZER, shown=b"so far ")
    before = "".join(first.feed(t) for t in raw[:at])
    second = Characters(TOKENIZER, first.shown, first.held)
    assert before + "".join(second.feed(t) for t in raw[at:]) == text


@given(raw=st.binary(min_size=1, max_size=200))
@settings(max_examples=150, deadline=None)
def test_bytes_that_are_no_text_break_nothing(raw):
    characters = Characters(TOKENIZER)
    shown = "".join(characters.feed(t) for t in raw)
    assert raw.decode(errors="replace").startswith(shown)


def test_a_bpe_tokenizer_streams_the_text_it_encodes():
    text = "the naïve café — the 日本語 the café 🙂 " * 20
    tokenizer = train_bpe(text.encode(), 320)
    characters = Characters(tokenizer)
    ids = tokenizer.encode(text).ids
    assert len(ids) < len(text.encode())
    assert "".join(characters.feed(i) for i in ids) == text
