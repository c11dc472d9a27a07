"""Models in several files, as the package gguf cuts them."""

from __future__ import annotations

import gguf
import pytest
import torch

import slipstream as ss
from slipstream.core.errors import InputError
from slipstream.data.tokenizer import byte_tokenizer
from slipstream.interop.gguf.write import save_gguf


@pytest.fixture
def parts(tmp_path):
    """The model, and the three files that it is in."""
    model = ss.language_model("attention(n_heads=2, n_kv_heads=1)", n_layers=2, d_model=32, seed=1)
    model.tokenizer = byte_tokenizer()
    save_gguf(model, tmp_path / "whole.gguf")
    reader = gguf.GGUFReader(tmp_path / "whole.gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=-(-len(reader.tensors) // 3))
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")) and len(field.data):
            kinds = field.types[0], field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), *kinds)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, [tmp_path / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


@pytest.mark.parametrize("given", range(3))
def test_any_part_stands_for_all(parts, given):
    model, files = parts
    back = ss.load(files[given])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name
    assert back.tokenizer.encode("a cat").ids == model.tokenizer.encode("a cat").ids


def test_a_missing_part_is_named(parts):
    _, files = parts
    files[1].unlink()
    with pytest.raises(InputError, match=r"one of 3 parts, and .*00002-of-00003\.gguf is not there"):
        ss.load(files[0])


def test_parts_of_something_else_are_refused(parts, tmp_path):
    _, files = parts
    files[2].write_bytes(files[1].read_bytes())
    with pytest.raises(InputError, match="is not part 3 of the model"):
        ss.load(files[0])
    lone = tmp_path / "lone.gguf"
    files[0].rename(lone)
    with pytest.raises(InputError, match="one of 3 parts"):
        ss.load(lone)
    (tmp_path / "x-00001-of-99999.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="99999 parts"):
        ss.load(tmp_path / "x-00001-of-99999.gguf")
