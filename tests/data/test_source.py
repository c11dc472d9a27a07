"""What is read, what is refused and in which words."""

from __future__ import annotations

import io
import sys

import pytest

from slipstream.core.errors import InputError
from slipstream.data.source import read_text, run_name


def test_the_novel_that_comes_with_slipstream():
    text = read_text(None)
    assert text.name == run_name(None) == "pride-and-prejudice"
    assert len(text.content) == 684_768
    assert b"It is a truth universally acknowledged" in text.content[:200]


def test_a_folder_is_all_its_text_in_sorted_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "second.py").write_text("two")
    (tmp_path / "a.md").write_text("one")
    (tmp_path / "z.txt").write_text("thrée")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / ".hidden").write_text("no")
    text = read_text(tmp_path)
    assert text.content.decode() == "one\ntwo\nthrée"
    assert text.name == run_name(tmp_path) == tmp_path.name
    assert "read 3 files; skipped 2" in text.notes[0]
    assert "picture.png" in text.notes[0]


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("né".encode())))
    assert read_text("-").content == "né".encode()


@pytest.mark.parametrize(
    ("raw", "text", "note"),
    [
        ("\ufeffhello".encode(), "hello", ""),
        ("naïve".encode("utf-16"), "naïve", "UTF-16"),
        ("a naïve café in a long enough text".encode("cp1252"), "a naïve café in a long enough text", "Windows-1252"),
        ("日本語日本語".encode()[:-1], "日本語日本\N{REPLACEMENT CHARACTER}", "1 damaged"),
    ],
)
def test_encodings(tmp_path, raw, text, note):
    file = tmp_path / "x.txt"
    file.write_bytes(raw)
    read = read_text(file)
    assert read.content.decode() == text
    assert note in " ".join(read.notes)


def test_missing_empty_and_binary_files_are_refused_in_words(tmp_path):
    (tmp_path / "book.txt").write_text("x")
    with pytest.raises(InputError, match=r"no file .*bok\.txt; did you mean book\.txt"):
        read_text(tmp_path / "bok.txt")
    with pytest.raises(InputError, match="there is no folder"):
        read_text(tmp_path / "nowhere" / "x.txt")
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(InputError, match=r"empty\.txt is empty \(0 bytes\)"):
        read_text(tmp_path / "empty.txt")
    (tmp_path / "binary").write_bytes(b"abc\0def")
    with pytest.raises(InputError, match="byte 0x00 at offset 3"):
        read_text(tmp_path / "binary")
    (tmp_path / "foreign").write_bytes("только".encode("koi8-r"))
    with pytest.raises(InputError, match=r"byte 0xd4 at offset 0; .*iconv"):
        read_text(tmp_path / "foreign")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="no text in the folder"):
        read_text(tmp_path / "nothing")
