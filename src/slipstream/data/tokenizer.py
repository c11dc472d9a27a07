"""From text to tokens and back. All are `tokenizers.Tokenizer`, so that a checkpoint always carries a tokenizer.json.

"bytes" is one too: byte-level BPE without merges, where a token's id is the byte.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from slipstream.core.errors import InputError
from slipstream.core.quantities import count
from slipstream.data.source import HELD_OUT

PIECE = 1 << 20  # characters encoded at a time: bounds the memory of encoding


def byte_tokenizer() -> Tokenizer:
    """256 tokens, id = byte."""
    tokenizer = Tokenizer(models.BPE(byte_vocabulary(), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@cache
def byte_vocabulary() -> dict[str, int]:
    """The printable letter byte-level BPE writes for each byte (GPT-2's table): printable ones stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def make_tokenizer(spec: str, text: bytes) -> Tokenizer:
    """The tokenizer that `spec` names; bpe:N is trained on what of the text is not held out."""
    if spec == "bytes":
        return byte_tokenizer()
    if spec.startswith("bpe:"):
        return train_bpe(text, count(spec.partition(":")[2]))
    return read_tokenizer(Path(spec))


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json. Raises InputError when it is missing or is none."""
    if not path.is_file():
        raise InputError(f"no tokenizer file {path}; write bytes, bpe:4096 or the path of a tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"{path} is no tokenizer.json ({error})") from None


def train_bpe(text: bytes, vocab_size: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's splitting into words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    characters = text.decode("utf-8")
    tokenizer.train_from_iterator(_pieces(characters[: int((1 - HELD_OUT) * len(characters))]), trainer)
    return tokenizer


def is_bytes(tokenizer: Tokenizer) -> bool:
    """Whether it maps every byte to itself, so that text need not be walked through."""
    plain = tokenizer.normalizer is None and tokenizer.get_vocab_size() == 256
    return plain and tokenizer.get_vocab() == byte_vocabulary()


def encode(tokenizer: Tokenizer, text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, and the bytes of text each token stands for: their sum is the text's length in bytes."""
    if is_bytes(tokenizer):
        return np.frombuffer(text, np.uint8), np.broadcast_to(np.uint8(1), len(text))
    ids, sizes = [], []
    for piece in _pieces(text.decode("utf-8")):
        encoding = tokenizer.encode(piece, add_special_tokens=False)
        ids.append(np.array(encoding.ids, np.min_scalar_type(tokenizer.get_vocab_size())))
        sizes.append(_bytes_each(piece, [end for _, end in encoding.offsets]))
    return np.concatenate(ids), np.concatenate(sizes)


def _bytes_each(piece: str, ends: list[int]) -> np.ndarray:
    """Bytes between the end of the token before and a token's own end; what follows the last token is the last token's.

    The tokens of one split character all end with it: the first gets its bytes, the others none.
    """
    if not ends:
        return np.zeros(0, np.uint32)
    points = np.frombuffer(piece.encode("utf-32-le"), np.uint32)
    upto = np.concatenate([[0], np.cumsum(1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF))])
    reached = np.maximum.accumulate(upto[np.array(ends)])
    reached[-1] = upto[-1]
    return np.diff(reached, prepend=0).astype(np.uint32)


def _pieces(text: str) -> list[str]:
    """About PIECE characters each, cut after a line's end so that words stay whole."""
    pieces, at = [], 0
    while len(text) - at > PIECE:
        cut = text.rfind("\n", at, at + PIECE) + 1 or at + PIECE
        pieces.append(text[at:cut])
        at = cut
    return [*pieces, text[at:]]
