"""Tiny random models of transformers, one a case, and what every family is held to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import slipstream as ss
from slipstream.interop.hf.family import Family, family
from slipstream.interop.hf.write import save_hf

T, CUTS = 29, (9, 0, 13, 3)  # a sequence longer than every window; the rest of it token by token
COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def their_model(model_type: str, **fields: Any) -> torch.nn.Module:
    """With the settings that most families have, and these."""
    return seeded(model_type, **COMMON | fields)


def seeded(model_type: str, **fields: Any) -> torch.nn.Module:
    """Of these settings alone. No parameter is left at a value that would hide what it is for."""
    config = CONFIG_MAPPING[model_type](**fields)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):  # of routers: on the choice alone
                buffer.add_(torch.randn_like(buffer) * 0.2)
    return model


def tokens(vocab_size: int) -> torch.Tensor:
    return torch.randint(3, vocab_size, (2, T), generator=torch.Generator().manual_seed(1))


def hold_to(model: torch.nn.Module, folder: Path) -> ss.LanguageModel:
    """Everything that is asked of a family: logits in all modes, and the way back. Returns ours."""
    model.save_pretrained(folder / "theirs")
    ours = ss.load(folder / "theirs")
    x = tokens(model.config.vocab_size)
    with torch.no_grad():
        want = model(input_ids=x, use_cache=False).logits
        close(ours(x), want)
        close(in_pieces(ours, x), want)
    save_hf(ours, folder / "back", model.config.model_type)
    same_tensors(folder / "theirs", folder / "back", family(model.config.model_type), ours)
    again = AutoModelForCausalLM.from_pretrained(folder / "back", attn_implementation="eager").eval()
    assert type(again) is type(model)
    with torch.no_grad():
        close(again(input_ids=x, use_cache=False).logits, want, 1e-6)
    return ours


def close(found: torch.Tensor, want: torch.Tensor, within: float = 1e-4) -> None:
    assert want.std() > 0.05, "logits must say something"
    assert (found - want).abs().max() <= within * want.abs().max()


def in_pieces(model: ss.LanguageModel, x: torch.Tensor) -> torch.Tensor:
    """Logits from prefills at cuts, then from steps."""
    state, logits, at = model.init_state(len(x), x.shape[1]), [], 0
    for n in CUTS:
        piece, state = model.prefill(x[:, at : at + n], state, logits="all")
        logits.append(piece)
        at += n
    for t in range(at, x.shape[1]):
        piece, state = model.step(x[:, t : t + 1], state)
        logits.append(piece)
    return torch.cat(logits, 1)


def same_tensors(theirs: Path, back: Path, kind: Family, ours: ss.LanguageModel) -> None:
    """Bit by bit, under the same names, as a family spells them; without those that it leaves unread."""
    one, two = (load_file(folder / "model.safetensors") for folder in (theirs, back))
    one = {kind.spelling(name): tensor for name, tensor in one.items() if not kind.surplus(name, ours.config)}
    assert sorted(one) == sorted(two)
    for name in one:
        assert one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]), name


def change(folder: Path, **fields: Any) -> None:
    """Set fields of a config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
