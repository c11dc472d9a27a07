"""Zamba2: one or two transformers that several layers share, before Mamba-2: logits, modes and round trips against transformers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import slipstream as ss
from slipstream.core.errors import InputError
from slipstream.interop.hf.write import save_hf

from .theirs import COMMON, change, close, hold_to, in_pieces, seeded, tokens

KINDS = ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid"]
SIZES = {
    "n_mamba_heads": 4,
    "mamba_d_state": 6,
    "chunk_size": 8,
    "adapter_rank": 3,
    "num_hidden_layers": len(KINDS),
    "layers_block_type": KINDS,
    "tie_word_embeddings": True,
}
TURNED = {"use_mem_rope": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
ADAPTED = {"use_shared_attention_adapter": True, "num_key_value_heads": 4}
CASES = {
    "one": {},
    "two, adapters everywhere": {"num_mem_blocks": 2, **ADAPTED, "mamba_ngroups": 2},
    "one, positions": {"use_mem_rope": True, **ADAPTED},
    "two, positions, biases": {"num_mem_blocks": 2, "add_bias_linear": True, **TURNED},
    "three": {"num_mem_blocks": 3, "time_step_min": 0.4, "hidden_act": "silu"},
    "more than uses": {"num_mem_blocks": 9},
}  # fmt: skip


def theirs(**fields):
    common = {name: value for name, value in COMMON.items() if name != "head_dim"}
    return seeded("zamba2", **common | SIZES | fields)


@pytest.mark.parametrize("case", CASES)
def test_zamba2(case, tmp_path):
    model = theirs(**CASES[case])
    ours = hold_to(model, tmp_path)
    assert ours.n_parameters() == sum(p.numel() for p in model.parameters())


def test_shared_weights_are_kept_once(tmp_path):
    model = theirs(num_mem_blocks=2)
    model.save_pretrained(tmp_path / "theirs")
    ours = ss.load(tmp_path / "theirs")
    ours.save(tmp_path / "own")
    names = load_file(tmp_path / "own" / "model.safetensors")
    assert sum("q_proj" in name for name in names) == 2
    again, x = ss.load(tmp_path / "own"), tokens(61)
    assert again.stack.blocks[1].mixers[0].qkv is again.stack.blocks[5].mixers[0].qkv
    assert torch.equal(again(x), ours(x))


def test_files_that_hold_a_copy_for_every_use_are_read(tmp_path):
    model, x = theirs(), tokens(61)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    first = "model.layers.1.shared_transformer."
    copies = {n.replace("layers.1.", "layers.5."): t.clone() for n, t in tensors.items() if n.startswith(first)}
    save_file(tensors | copies, tmp_path / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        close(in_pieces(ss.load(tmp_path), x), model(input_ids=x, use_cache=False).logits)


TRANSFORMER = "zamba2_transformer(reads_embedding=true, adapter_rank=2, {})/mamba2"
UNSAID = {
    "one set of weights": [
        "tied=0, to_next=true",
        "tied=0, to_next=true",
        "tied=1, to_next=true",
        "tied=1, to_next=true",
    ],
    "speak to the next one alone": ["tied=0"] * 4,
}


@pytest.mark.parametrize("why", UNSAID)
def test_what_the_family_cannot_say_is_not_written(why, tmp_path):
    """Weights that do not take turns; what a transformer says added to the stream."""
    pattern = ", ".join(map(TRANSFORMER.format, UNSAID[why]))
    model = ss.language_model(pattern, n_layers=4, d_model=32, norm_eps=1e-5)
    with pytest.raises(InputError, match=why):
        save_hf(model, tmp_path, "zamba2")


REFUSED = {
    "tie_word_embeddings = False": {"tie_word_embeddings": False},
    "num_key_value_heads must be 4": {"use_shared_attention_adapter": True},
    "must be a list of 7 words": {"layers_block_type": ["hybrid"]},
    "does not divide into num_attention_heads": {"num_attention_heads": 5},
    "field 'ft_lora'": {"ft_lora": True},
}


@pytest.mark.parametrize("complaint", REFUSED)
def test_what_is_not_here_is_told(complaint, tmp_path):
    """Without tied embeddings, transformers (5.23) leaves its transformers untied too."""
    theirs().save_pretrained(tmp_path)
    change(tmp_path, **REFUSED[complaint])
    with pytest.raises(InputError, match=complaint):
        ss.load(tmp_path)
