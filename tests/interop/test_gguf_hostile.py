"""Damaged and hostile GGUF files end in one line, at once, and without memory for what they claim."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest
import torch

import slipstream as ss
from slipstream.core.errors import InputError
from slipstream.data.tokenizer import byte_tokenizer
from slipstream.interop.gguf.container import GGUF
from slipstream.interop.gguf.container_out import write_gguf
from slipstream.interop.gguf.write import save_gguf

from .test_gguf import theirs_and_ours

HEADER = 4 + 4 + 8 + 8  # magic, version, tensors, settings


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    model = ss.language_model("attention(n_heads=2, n_kv_heads=1)", n_layers=1, d_model=32, d_ff=32)
    model.tokenizer = byte_tokenizer()
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    save_gguf(model, path)
    return path.read_bytes()


def load(data, folder):
    (folder / "x.gguf").write_bytes(data)
    return ss.load(folder / "x.gguf")


def refused(data, folder, match):
    with pytest.raises(InputError, match=match) as error:
        load(data, folder)
    assert "\n" not in str(error.value)


def test_mutated_bytes_are_refused_or_read(whole, tmp_path):
    draw, refusals = random.Random(0), 0
    end = whole.index(b"token_embd.weight") + 2000  # the settings and the list of tensors, and a little of the data
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 1, 2, 8])):
            data[draw.randrange(min(end, len(data)))] = draw.choice([0, 1, 255, 128, draw.randrange(256)])
        try:
            load(bytes(data), tmp_path)
        except InputError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert refusals > 30


def test_cut_short_anywhere(whole, tmp_path):
    for size in [*range(0, 400, 7), *range(400, len(whole), len(whole) // 40)]:
        refused(whole[:size], tmp_path, "x.gguf")


def header(tensors, settings, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, settings)


def name(text):
    return struct.pack("<Q", len(text)) + text


HUGE = (1 << 64) - 1
CLAIMS = {
    "a name of 2^64 bytes": header(0, 1) + struct.pack("<Q", HUGE) + bytes(64),
    "2^64 settings": header(0, HUGE) + bytes(64),
    "2^64 tensors": header(HUGE, 0) + bytes(64),
    "an array of 2^61 numbers": header(0, 1) + name(b"a") + struct.pack("<IIQ", 9, 4, 1 << 61) + bytes(64),
    "an array of 2^60 texts": header(0, 1) + name(b"a") + struct.pack("<IIQ", 9, 8, 1 << 60) + bytes(64),
    "arrays in an array": header(0, 1) + name(b"a") + struct.pack("<IIQ", 9, 9, 1 << 40) + bytes(64),
    "an unknown type": header(0, 1) + name(b"a") + struct.pack("<I", 77) + bytes(64),
    "an old version": header(0, 0, 1),
    "the other order of bytes": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "five axes": header(1, 0) + name(b"t") + struct.pack("<I5QIQ", 5, 1, 1, 1, 1, 1, 0, 0),
    "an axis of 2^63": header(1, 0) + name(b"t") + struct.pack("<IQIQ", 1, 1 << 63, 0, 0) + bytes(64),
    "axes whose product is 2^126": header(1, 0)
    + name(b"t")
    + struct.pack("<I2QIQ", 2, 1 << 63, 1 << 63, 0, 0)
    + bytes(64),
    "half a block": header(1, 0) + name(b"t") + struct.pack("<IQIQ", 1, 33, 8, 0) + bytes(256),
    "an odd offset": header(1, 0) + name(b"t") + struct.pack("<IQIQ", 1, 4, 0, 5) + bytes(256),
    "an offset beyond the end": header(1, 0) + name(b"t") + struct.pack("<IQIQ", 1, 4, 0, 1 << 62) + bytes(256),
    "a tensor of no known type": header(1, 0) + name(b"t") + struct.pack("<IQIQ", 1, 4, 999, 0) + bytes(256),
    "no bytes at all": b"",
    "something else": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_claims(claim, tmp_path):
    refused(CLAIMS[claim], tmp_path, "x.gguf")


def test_tensors_over_each_other(tmp_path):
    infos = [name(t) + struct.pack("<IQIQ", 1, 64, 0, 32 * i) for i, t in enumerate((b"a", b"b"))]
    refused(header(2, 0) + b"".join(infos) + bytes(1024), tmp_path, "lie over each other")


SAID = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 8,
    "llama.attention.head_count": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
BLOCK = {f"blk.0.attn_{x}.weight": torch.zeros(8, 8) for x in ("q", "k", "v", "output")}
BLOCK |= {f"blk.0.ffn_{x}.weight": torch.zeros(8, 8) for x in ("gate", "up", "down")}
BLOCK |= {n: torch.ones(8) for n in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")}
TENSORS = {"token_embd.weight": torch.zeros(16, 8), **BLOCK}


@pytest.mark.parametrize(
    ("settings", "tensors", "said"),
    [
        ({"general.architecture": "lama"}, {}, "did you mean llama"),
        ({"general.architecture": 7}, {}, "is called 7"),
        ({"llama.block_count": 1 << 23}, {}, "8388608 layers"),
        ({"llama.block_count": 2}, {}, "lacks the tensor blk.1"),
        ({"llama.embedding_length": 1 << 24, "llama.attention.key_length": 4}, {}, "should make"),
        ({"llama.attention.head_count": 0}, {}, "a whole number from 1"),
        ({"llama.attention.head_count": [2, 2]}, {}, "must be a whole number"),
        ({"llama.expert_count": 8}, {}, "expert_used_count"),
        ({"llama.new_kind_of_scale": 0.5}, {}, "new_kind_of_scale"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, {}, "finite"),
        ({"split.count": 3}, {}, "one of 3 parts"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "a"]}, {}, "twice"),
        ({}, {"blk.0.attn_q.weight": torch.zeros(7, 8)}, "should make"),
        ({}, {"blk.0.attn_q.weight": torch.zeros(8)}, "should make"),
        ({}, {"token_embd.weight": torch.zeros(16)}, "no matrix token_embd"),
        ({}, {"token_embd.weight": None}, "no matrix token_embd"),
        ({}, {"blk.0.ffn_up.weight": None}, "lacks the tensor blk.0.ffn_up.weight"),
        ({}, {"blk.0.attn_sinks.weight": torch.zeros(2)}, "do not speak of"),
        ({}, {"rope_freqs.weight": torch.full((2,), 3.7)}, "not those of Llama 3.1"),
    ],
)
def test_what_does_not_fit_together(settings, tensors, said, tmp_path):
    everything = {n: t for n, t in (TENSORS | tensors).items() if t is not None}
    write_gguf(tmp_path / "x.gguf", SAID | settings, everything)
    with pytest.raises(InputError, match=said) as error:
        ss.load(tmp_path / "x.gguf")
    assert "\n" not in str(error.value)


ODD = [
    0,
    1,
    2,
    3,
    5,
    64,
    1 << 20,
    1 << 31,
    0.5,
    1e30,
    float("nan"),
    True,
    False,
    "x",
    [0] * 4,
    [2] * 4,
    [0, 2, 0, 2],
    [0.5],
]
MIXED = ["mixtral", "gpt-oss", "jamba", "granite", "nemotron_h", "falcon-h1", "qwen3next", "lfm2moe", "deepseek v2"]


@pytest.mark.parametrize("case", MIXED)
def test_odd_settings_and_tensors_are_refused_or_read(case, tmp_path):
    save_gguf(theirs_and_ours(case, tmp_path)[1], tmp_path / "a.gguf")
    file, draw = GGUF(tmp_path / "a.gguf"), random.Random(0)
    said = {n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in file.settings.items()}
    tensors = {n: file.raw(n).view(torch.float32).view(t.shape) for n, t in file.tensors.items()}
    own, refusals = [n for n in said if not n.startswith(("general.", "tokenizer."))], 0
    for _ in range(20):
        name, changed = draw.choice(list(tensors)), dict(tensors)
        changed[name] = draw.choice([tensors[name], tensors[name][:1].contiguous()])
        write_gguf(tmp_path / "x.gguf", said | {draw.choice(own): draw.choice(ODD)}, changed)
        try:
            ss.load(tmp_path / "x.gguf")
        except InputError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert refusals > 5


def test_what_fits_is_read(tmp_path):
    write_gguf(tmp_path / "x.gguf", SAID, TENSORS)
    assert ss.load(tmp_path / "x.gguf").config.vocab_size == 16
