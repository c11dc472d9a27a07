"""A tokenizer and conventions of ours as a GGUF file's settings: the inverse of vocabulary.py.

Merges by score are written with their ranks as scores, which is all that llama.cpp makes of them.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

from slipstream.core.errors import InputError
from slipstream.interop.gguf.splitting import name_of
from slipstream.interop.gguf.vocabulary import BYTE, CONTROL, NORMAL, SPACE, SPECIAL, UNKNOWN, UNUSED, USER_DEFINED
from slipstream.models.conventions import Conventions


def their_vocabulary(tokenizer: Tokenizer | None, conventions: Conventions, vocab_size: int) -> dict[str, Any]:
    """tokenizer.*; without a tokenizer the model runs on token ids. Raises InputError for a tokenizer llama.cpp has none like."""
    if tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    about = json.loads(tokenizer.to_str())
    if about["model"]["type"] != "BPE":
        raise InputError(f"tokenizers of kind {about['model']['type']} cannot be written as GGUF, only BPE")
    tokens, types = _tokens(tokenizer, about, vocab_size)
    merges = [m.split(" ", 1) if isinstance(m, str) else m for m in about["model"]["merges"]]
    said = _by_score(about, tokens, merges) if about["model"].get("byte_fallback") else _by_rank(about, merges)
    if said["model"] == "llama":
        types = [BYTE if _is_byte(t) and k == NORMAL else k for t, k in zip(tokens, types)]
    said |= {"tokens": tokens, "token_type": types, **_special(tokenizer, conventions)}
    named = {f"tokenizer.ggml.{name}": value for name, value in said.items()}
    template = conventions.chat_template
    return named if template is None else named | {"tokenizer.chat_template": template}


def _tokens(tokenizer: Tokenizer, about: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Texts by id, and their kinds; places that the tokenizer leaves empty are filled."""
    texts = {i: text for text, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    if texts and max(texts) >= vocab_size:
        raise InputError(f"the tokenizer has a token {max(texts)}, but the model only {vocab_size}")
    types = dict.fromkeys(texts, NORMAL)
    types |= {t["id"]: CONTROL if t["special"] else USER_DEFINED for t in about["added_tokens"]}
    unknown = tokenizer.token_to_id(about["model"].get("unk_token") or "")
    if unknown is not None and types[unknown] == NORMAL:
        types[unknown] = UNKNOWN
    every = range(vocab_size)
    return [texts.get(i, f"[PAD{i}]") for i in every], [types.get(i, UNUSED) for i in every]


def _by_rank(about: dict[str, Any], merges: list[list[str]]) -> dict[str, Any]:
    """GPT-2's. A normalizer is left out, as llama.cpp's own conversions do with NFC."""
    if about["normalizer"] not in (None, {"type": "NFC"}) or about["pre_tokenizer"] is None:
        raise InputError(
            "the model's tokenizer changes the text as none of llama.cpp's does: train with bytes or bpe:N"
        )
    cut = name_of(about["pre_tokenizer"], bool(merges))
    return {"model": "gpt2", "pre": cut, "merges": [" ".join(merge) for merge in merges]}


def _by_score(about: dict[str, Any], tokens: list[str], merges: list[list[str]]) -> dict[str, Any]:
    """SentencePiece's."""
    normalizer = about["normalizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    spaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prefix = {"type": "Prepend", "prepend": SPACE}
    if steps not in ([spaced], [prefix, spaced]):
        raise InputError(
            "the model's tokenizer changes the text as none of llama.cpp's does: train with bytes or bpe:N"
        )
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    scores = [-float(ranks.get(token, len(merges))) for token in tokens]
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefix in steps}


def _special(tokenizer: Tokenizer, conventions: Conventions) -> dict[str, Any]:
    """Ids of special tokens, and whether texts begin with one."""
    ids = {name: tokenizer.token_to_id(conventions.special.get(f"{name}_token", "")) for name in SPECIAL}
    ids |= {name: i for name, i in (("bos", conventions.bos_id), ("pad", conventions.pad_id)) if i is not None}
    ends = dict(zip(("eos_token_id", "eot_token_id", "eom_token_id"), conventions.eos_ids))
    begins = conventions.bos_id is not None and tokenizer.encode("a").ids[:1] == [conventions.bos_id]
    said = {SPECIAL[name]: i for name, i in ids.items() if i is not None}
    return said | ends | {"add_bos_token": begins, "add_eos_token": False}


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
