"""Tokens and back, and the bytes each token stands for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from slipstream.core.errors import InputError
from slipstream.data import tokenizer as tok
from slipstream.data.source import read_text
from slipstream.data.spec import check

NOVEL = read_text(None).content


@given(st.text(min_size=1))
@settings(max_examples=50, deadline=None)
def test_the_byte_tokenizer_is_the_bytes(text):
    """The quick way through numpy equals what the tokenizer itself says, and it decodes to the same text."""
    tokenizer = tok.byte_tokenizer()
    ids, sizes = tok.encode(tokenizer, text.encode())
    assert ids.tolist() == tokenizer.encode(text).ids == list(text.encode())
    assert sizes.sum() == len(text.encode())
    assert tokenizer.decode(ids.tolist()) == text


def test_it_survives_the_way_through_a_file(tmp_path):
    tok.byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert tok.is_bytes(tok.read_tokenizer(tmp_path / "tokenizer.json"))


def test_bpe_decodes_to_the_text_and_its_sizes_are_the_texts(monkeypatch):
    text = NOVEL[:60_000] + "naïve café — 日本語 🙂🙂\n".encode() * 20
    tokenizer = tok.make_tokenizer("bpe:600", text)
    assert tokenizer.get_vocab_size() == 600
    monkeypatch.setattr(tok, "PIECE", 5_000)
    ids, sizes = tok.encode(tokenizer, text)
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids.tolist()).encode() == text
    assert sizes.sum() == len(text)
    own = [len(tokenizer.id_to_token(i)) for i in ids[:1000].tolist()]  # one letter a byte, in ASCII text
    assert sizes[:1000].tolist() == own


def test_sizes_are_right_where_a_normalizer_drops_text():
    """A word tokenizer that lowers case and knows few words: every byte of the original is still counted."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "über": 2}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    text = "The Über  cat. \n".encode()
    ids, sizes = tok.encode(tokenizer, text)
    assert ids.tolist() == [1, 2, 0, 0]
    assert sizes.tolist() == [3, 6, 5, 3]
    assert sizes.sum() == len(text)


def test_a_character_split_over_tokens_is_counted_once():
    tokenizer = tok.make_tokenizer("bpe:260", b"abc " * 50)
    ids, sizes = tok.encode(tokenizer, "a🙂b".encode())
    assert len(ids) == 6
    assert sizes.tolist() == [1, 4, 0, 0, 0, 1]


def test_what_is_held_out_is_not_learned_from():
    text = b"the cat sat on the mat\n" * 90 + b"zqzq zqzq zqzqzq\n" * 10
    assert "zq" not in tok.make_tokenizer("bpe:290", text).get_vocab()


@pytest.mark.parametrize("spec", ["bpe:100", "words", "bpe:", "bpe:x"])
def test_specs_that_are_none(spec):
    with pytest.raises(ValueError, match=r"bpe:4096|count|number"):
        check(spec)


def test_a_missing_or_broken_tokenizer_file(tmp_path):
    with pytest.raises(InputError, match="no tokenizer file"):
        tok.make_tokenizer(str(tmp_path / "no.json"), b"")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match=r"bad\.json is no tokenizer\.json"):
        tok.make_tokenizer(str(tmp_path / "bad.json"), b"")
