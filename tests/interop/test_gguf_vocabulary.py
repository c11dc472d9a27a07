"""Tokenizers in GGUF files: against a plain loop, on every plane of Unicode, and back."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import slipstream as ss
from slipstream.core.errors import InputError
from slipstream.data.tokenizer import byte_tokenizer, train_bpe
from slipstream.interop.gguf.cuts import cuts_in_two
from slipstream.interop.gguf.splitting import BY_NAME, splitter
from slipstream.interop.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Vocabulary
from slipstream.interop.gguf.vocabulary_out import their_vocabulary
from slipstream.interop.gguf.write import save_gguf
from slipstream.models.conventions import Conventions

TEXT = "the cat sat on the mat, and the hat of the cat was on the mat; 12345 times that is 3.5 that's it\n\n\tthen they sat. "
PLANES = "".join(
    chr(plane << 16 | place) for plane in range(17) for place in (0x41, 0xE9, 0x4E2D, 0xF60D, 0xFFFD) if plane or place
)
EDGES = ["", " ", "  a", "a  ", "\n\n\n", "it's 12345", "naïve 中文 😀👩‍👩‍👧 \u200d", "\x00\x01", "ÿþ", PLANES]


def scored(**more):
    """SentencePiece's form: special tokens, bytes, letters, and the joins that a text suggests, the most frequent first."""
    letters = sorted(set(TEXT.replace(" ", "▁").replace("\n", "").replace("\t", "")))
    joins = [
        "th",
        "▁the",
        "at",
        "▁c",
        "▁cat",
        "he",
        "▁t",
        "▁th",
        "sat",
        "▁sat",
        "▁m",
        "▁mat",
        "an",
        "▁an",
        "▁and",
        "▁▁",
        "▁s",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *joins, *letters, "<turn>", "<div>"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(joins) + len(letters)), CONTROL, USER_DEFINED]
    scores = [0.0] * 259 + [-float(i) for i in range(len(joins))] + [-1000.0] * (len(letters) + 2)
    said = {"model": "llama", "tokens": tokens, "token_type": np.array(types), "scores": np.array(scores)}
    return {f"tokenizer.ggml.{name}": value for name, value in (said | more).items()}


def by_hand(settings, text):
    """The best pair first, the leftmost of equals; what is no token is bytes."""
    tokens, scores = settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.scores"]
    ids, parts = {t: i for i, t in enumerate(tokens)}, list(text.replace(" ", "▁"))
    while pairs := [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]:
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [i for p in parts for i in ([ids[p]] if p in ids else [ids[f"<0x{b:02X}>"] for b in p.encode()])]


def test_scores_merge_as_a_plain_loop_does():
    settings = scored(add_space_prefix=False)
    tokenizer, draw = Vocabulary(settings, "x").tokenizer(), random.Random(0)
    for _ in range(200):
        text = "".join(draw.choice([*"thecasm t  ", "é", "the ", " cat", "😀"]) for _ in range(draw.randrange(30)))
        assert tokenizer.encode(text, add_special_tokens=False).ids == by_hand(settings, text), text


def test_all_cuts_in_two_are_found():
    draw = random.Random(2)
    tokens = list({"".join(draw.choice("ab é😀▁") for _ in range(draw.randrange(1, 9))) for _ in range(3000)})
    words, known = tokens[::2], set(tokens)
    assert cuts_in_two(words, tokens) == [
        (w[:at], w[at:]) for w in words for at in range(1, len(w)) if w[:at] in known and w[at:] in known
    ]
    assert cuts_in_two(["ab"], ["a", "ab"]) == cuts_in_two([], ["a"]) == []


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("text", EDGES)
def test_every_plane_comes_back_from_scores(text, prefix):
    tokenizer = Vocabulary(scored(add_space_prefix=prefix), "x").tokenizer()
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    "cut", ["gpt-2", "smollm", "llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o", "deepseek-v3", "default", "falcon"]
)
def test_every_plane_comes_back_from_ranks(cut):
    tokenizer = trained(cut)
    again = read_back(tokenizer, Conventions())
    draw = random.Random(1)
    texts = [*EDGES, *("".join(draw.choice(TEXT + "ÄéΩ中 \n\r9") for _ in range(40)) for _ in range(50))]
    for text in texts:
        ids = again.encode(text).ids
        assert ids == tokenizer.encode(text).ids and again.decode(ids) == text


def trained(cut):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter(cut), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def as_read(settings):
    """Lists of numbers as the reader gives them."""
    return {
        n: np.array(v) if isinstance(v, list) and v and not isinstance(v[0], str) else v for n, v in settings.items()
    }


def read_back(tokenizer, conventions, room=0):
    size = tokenizer.get_vocab_size() + room
    return Vocabulary(as_read(their_vocabulary(tokenizer, conventions, size)), "x").tokenizer()


def test_gpt2_cuts_are_those_of_the_tokenizers_package():
    ours, theirs = splitter("gpt-2"), pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in [TEXT, *EDGES]:
        assert [p for p, _ in ours.pre_tokenize_str(text)] == [p for p, _ in theirs.pre_tokenize_str(text)]


def test_all_cuts_can_be_built():
    for name in BY_NAME:
        assert (
            "".join(piece for piece, _ in splitter(name).pre_tokenize_str("a b1 2345\n"))
            .replace("Ġ", " ")
            .replace("Ċ", "\n")
            == "a b1 2345\n"
        )


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: train_bpe(TEXT.encode() * 20, 320)], ids=["bytes", "bpe"])
def test_our_own_tokenizers_go_and_come_back(make):
    tokenizer = make()
    again = read_back(tokenizer, Conventions(), room=3)
    for text in [TEXT, *EDGES]:
        assert again.encode(text).ids == tokenizer.encode(text).ids
        assert again.decode(again.encode(text).ids) == text


def test_special_tokens_and_conversations_go_and_come_back():
    settings = scored(add_bos_token=True, bos_token_id=1, eos_token_id=2, unknown_token_id=0)
    settings["tokenizer.chat_template"] = "{{ bos_token }}{{ messages[0]['content'] }}"
    first = Vocabulary(settings, "x")
    tokenizer, said = first.tokenizer(), first.conventions()
    assert said.prompt([{"role": "user", "content": "hi"}]) == "<s>hi"
    assert (said.bos_id, said.eos_ids, said.special["unk_token"]) == (1, (2,), "<unk>")
    second = Vocabulary(as_read(their_vocabulary(tokenizer, said, tokenizer.get_vocab_size())), "y")
    assert second.conventions() == said
    for text in [TEXT, "<turn>the cat<div> sat", *EDGES]:
        ids = tokenizer.encode(text).ids
        assert ids[0] == 1 and second.tokenizer().encode(text).ids == ids
    turn = tokenizer.token_to_id("<turn>")
    assert (
        turn in tokenizer.encode("the<turn>cat").ids and tokenizer.token_to_id("<div>") in tokenizer.encode("<div>").ids
    )


def test_the_end_of_an_answer_is_known_by_its_text():
    settings = scored()
    settings["tokenizer.ggml.tokens"][-2] = "<end_of_turn>"
    assert Vocabulary(settings, "x").conventions().eos_ids == (2, len(settings["tokenizer.ggml.tokens"]) - 2)


def test_a_text_ends_where_the_file_says(tmp_path):
    model = ss.language_model("attention(n_heads=2)", n_layers=1, d_model=32, seed=3)
    model.tokenizer = byte_tokenizer()
    first = next(iter(ss.generate(model, list(b"a"), max_new_tokens=1, temperature=0)))
    model.conventions = Conventions(eos_ids=(first,))
    save_gguf(model, tmp_path / "a.gguf")
    stream = ss.generate(ss.load(tmp_path / "a.gguf"), "a", max_new_tokens=20, temperature=0)
    assert "".join(stream) == "" and stream.ended == "stop"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": ["a", "a"]}, "twice"),
        ({"tokens": ["a" * 5000]}, "5000 characters"),
        ({"tokens": 7}, "no list"),
        ({"scores": np.zeros(3)}, "scores are not one for each"),
        ({"bos_token_id": 99999}, "a special token is none of"),
        ({"model": "gpt2", "pre": "gpt-3"}, "no way to cut words"),
        ({"model": "gpt2", "merges": "a b"}, "no list"),
    ],
)
def test_damaged_vocabularies_are_refused(change, said):
    with pytest.raises(InputError, match=said):
        Vocabulary(
            scored(**change) | ({} if "tokens" not in change else {"tokenizer.ggml.token_type": None}), "x"
        ).tokenizer()


def test_other_kinds_run_on_token_ids():
    assert Vocabulary(scored(model="bert"), "x").tokenizer() is None
    assert Vocabulary({}, "x").tokenizer() is None


def test_tokenizers_that_llama_cpp_has_none_like_are_refused():
    odd = Tokenizer(models.BPE({"a": 0}, []))
    odd.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError, match="cuts words as none"):
        their_vocabulary(odd, Conventions(), 1)
    with pytest.raises(InputError, match="WordLevel"):
        their_vocabulary(Tokenizer(models.WordLevel({"a": 0}, "a")), Conventions(), 1)
