"""Checkpoints from strangers: whatever is in their files, the answer is a model or one line, soon, and nothing runs or grows."""

from __future__ import annotations

import json
import random
import resource
import struct
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import slipstream as ss
from slipstream.core.errors import InputError

from .test_loading import tokenizer
from .theirs import change, their_model

ROOM = 1 << 30  # bytes that a refusal may take at most


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    their_model("llama", vocab_size=259, num_hidden_layers=2).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    for file in sound.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def header(folder):
    """The table at the head of a safetensors file, and the bytes behind it."""
    raw = (folder / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def write(folder, table, data, size=None):
    text = json.dumps(table).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", size or len(text)) + text + data)


def refused(folder, complaint="."):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=complaint) as told:
        ss.load(folder)
    assert "\n" not in str(told.value) and len(str(told.value)) < 4000
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < ROOM


def all_at_the_start(table):
    def moved(about):
        begin, end = about["data_offsets"]
        return about | {"data_offsets": [0, end - begin]}

    return {name: about if name == "__metadata__" else moved(about) for name, about in table.items()}


TENSOR = "model.embed_tokens.weight"
FORGED = {
    "a huge header": lambda t, d: (t, d, 1 << 60),
    "a header longer than the file": lambda t, d: (t, d, len(json.dumps(t)) + len(d) + 999),
    "no header": lambda t, d: ({}, b"", None),
    "offsets beyond the end": lambda t, d: ({**t, TENSOR: {**t[TENSOR], "data_offsets": [0, 1 << 50]}}, d, None),
    "offsets that overlap": lambda t, d: (all_at_the_start(t), d, None),
    "a shape that overflows": lambda t, d: ({**t, TENSOR: {**t[TENSOR], "shape": [1 << 62, 1 << 62]}}, d, None),
    "a negative shape": lambda t, d: ({**t, TENSOR: {**t[TENSOR], "shape": [-1, 32]}}, d, None),
    "an unknown dtype": lambda t, d: ({**t, TENSOR: {**t[TENSOR], "dtype": "F99"}}, d, None),
    "the rest cut off": lambda t, d: (t, d[: len(d) // 2], None),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_weights_are_told(folder, case):
    write(folder, *FORGED[case](*header(folder)))
    refused(folder)


def test_tensors_that_are_missing_renamed_or_of_another_shape(folder):
    weights = load_file(folder / "model.safetensors")
    for change_, complaint in (
        (lambda w: w.pop(TENSOR), "lacks the tensor"),
        (lambda w: w.update({TENSOR: w[TENSOR].T.contiguous()}), "config.json makes"),
        (lambda w: w.update({TENSOR: w[TENSOR].long()}), "quantised"),
        (lambda w: w.update({"model.layers.0.evil.weight": w[TENSOR].clone()}), "does not speak of"),
    ):
        changed = dict(weights)
        change_(changed)
        save_file(changed, folder / "model.safetensors")
        refused(folder, complaint)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 1 << 62},
        {"hidden_size": -32},
        {"hidden_size": 2.5},
        {"hidden_size": "32"},
        {"hidden_size": True},
        {"vocab_size": 1 << 24},
        {"num_hidden_layers": 1 << 24},
        {"num_attention_heads": 1 << 24},
        {"head_dim": 1 << 24},
        {"intermediate_size": (1 << 24) - 1},
        {"rms_norm_eps": 0.0},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": None, "norm_eps": 1.0},
        {"rope_parameters": {"rope_type": "yarn", "factor": -2.0, "original_max_position_embeddings": 16}},
        {"rope_parameters": {"rope_type": "linear", "factor": 0}},
        {"rope_parameters": {"rope_type": "linear"}},
        {"rope_parameters": [1]},
        {"rope_parameters": {"rope_theta": -1.0}},
        {"rope_parameters": {"rope_theta": float("inf")}},
        {"hidden_act": ["silu"]},
        {"model_type": ["llama"]},
        {"model_type": "../../etc/passwd"},
        {"model_type": "mixtral", "num_local_experts": 1 << 24},
        {"model_type": "gemma3_text", "layer_types": ["full_attention"] * 3},
        {"model_type": "gemma3_text", "layer_types": [{}, {}]},
        {"model_type": "slipstream"},
    ],
    ids=str,
)
def test_hostile_settings_are_told(folder, fields):
    change(folder, **fields)
    refused(folder)


@pytest.mark.parametrize(
    "text", [b"", b"[", b"[]", b"nul", b"\xff\xfe", b"[" * 100_000, b'{"model_type": "llama"}', b"1" * 5000]
)
def test_a_config_that_is_none(folder, text):
    (folder / "config.json").write_bytes(text)
    refused(folder)


@pytest.mark.parametrize(
    "part", ["../model.safetensors", "/etc/passwd", "model.bin", "absent.safetensors", 7, "a/b.safetensors"]
)
def test_an_index_names_files_of_its_folder_alone(folder, part):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": dict.fromkeys(weights, part)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder)
    (folder.parent / "model.safetensors").unlink()


@pytest.mark.parametrize("text", [b"", b"{}", b'{"model": 3}', b"\x00" * 50, b"[" * 100_000])
def test_a_tokenizer_that_is_none(folder, text):
    (folder / "tokenizer.json").write_bytes(text)
    refused(folder, "tokenizer.json")


def test_no_pickle_runs_code(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "it ran"), "w"))

    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pth"):
        torch.save({TENSOR: Bomb()}, folder / name)
        refused(folder, "weights alone")
        (folder / name).unlink()
    assert not (tmp_path / "it ran").exists()


FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.mark.parametrize("file", FILES)
def test_bytes_changed_anywhere_give_a_model_or_one_line(folder, file):
    """Flips, cuts, doublings and runs of zeros at random places, of a fixed seed."""
    draw, whole = random.Random(hash_of(file)), (folder / file).read_bytes()
    reach = min(len(whole), 4096)  # of the weights, the head: behind it all bytes are numbers
    for _ in range(40):
        bad = bytearray(whole)
        for _ in range(draw.choice((1, 1, 3, 20))):
            at = draw.randrange(reach)
            kind = draw.randrange(4)
            if kind == 0:
                bad[at % len(bad)] ^= 1 << draw.randrange(8)
            elif kind == 1:
                bad[at : at + draw.randrange(1, 30)] = b""
            elif kind == 2:
                bad[at:at] = bad[at : at + draw.randrange(1, 30)]
            else:
                bad[at : at + 8] = bytes(8)
        (folder / file).write_bytes(bytes(bad))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert ss.load(folder).config.d_model > 0
        except InputError as error:
            assert "\n" not in str(error)


def hash_of(text: str) -> int:
    return sum(text.encode())
