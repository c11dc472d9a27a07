"""The tokenizer in a GGUF file's settings, as a `tokenizers.Tokenizer`, and what is said there of its special tokens.

llama   SentencePiece's pairs by score: the best pair first, wherever it is; what no token has becomes bytes
gpt2    merges by rank within words of bytes (splitting.py)

A pair of tokens whose join is a token of the vocabulary may merge, with the score of the join: so the merges of the first kind
are all cuts of all tokens in two, the best score first. Other kinds (WordPiece, Unigram, RWKV's) are not read: the model runs,
on token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from slipstream.core.errors import InputError
from slipstream.interop.gguf.cuts import cuts_in_two
from slipstream.interop.gguf.splitting import TOKENS_ARE_WORDS, splitter
from slipstream.models.conventions import Conventions

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
LONGEST = 4096  # characters of a token: what is longer is no word but an attack
SPACE = "▁"  # SentencePiece's letter for a space
ENDS = frozenset(  # of an answer, whatever the file calls its end: as llama.cpp has them
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eom_id|>",
        "<EOT>",
        "<|return|>",
        "<|call|>",
    ]
)
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
DEFAULTS = {"llama": {"bos": 1, "eos": 2, "unk": 0}}


class Vocabulary:
    """tokenizer.* of a file."""

    def __init__(self, settings: dict[str, Any], owner: str) -> None:
        """Raises InputError when it is damaged."""
        self.settings, self.owner = settings, owner
        self.model = self._of("model", "no_vocab", str)
        self.tokens = [t or f"[EMPTY_{i}]" for i, t in enumerate(self._of("tokens", [], list))]
        self.types = self._per_token("token_type", NORMAL)
        defaults = DEFAULTS.get(self.model, {})
        self.ids = {name: self._id(key, defaults.get(name)) for name, key in SPECIAL.items()}

    def tokenizer(self) -> Tokenizer | None:
        """None for a kind that is not read here."""
        if self.model not in KINDS:
            return None
        if len(set(self.tokens)) != len(self.tokens) or not self.tokens:
            raise InputError(f"{self.owner}: its vocabulary is empty or has a token twice; download it again")
        if (longest := max(map(len, self.tokens))) > LONGEST:
            raise InputError(f"{self.owner}: its vocabulary has a token of {longest} characters; download it again")
        try:
            made = KINDS[self.model](self)
        except InputError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"{self.owner}: its tokenizer cannot be built ({error!s:.120})") from None
        self._add_special(made)
        self._add_ends(made)
        return made

    def conventions(self) -> Conventions:
        """Where texts begin and end, and the template of conversations."""
        ends = [self.ids["eos"], self._id("eot_token_id"), self._id("eom_token_id")]
        ends += [i for i, t in enumerate(self.tokens) if self.types[i] == CONTROL and t in ENDS]
        template = self.settings.get("tokenizer.chat_template")
        return Conventions(
            tuple(dict.fromkeys(i for i in ends if i is not None)),
            self.ids["bos"] if self._begins() else None,
            self.ids["pad"],
            template if isinstance(template, str) else None,
            {f"{name}_token": self.tokens[i] for name, i in self.ids.items() if i is not None and i < len(self.tokens)},
        )

    def by_score(self) -> Tokenizer:
        """SentencePiece's, without a cut: words may hold spaces."""
        vocabulary, scores = {token: i for i, token in enumerate(self.tokens)}, self._per_token("scores", 0.0)
        unknown = self.ids["unk"]
        unknown_text = self.tokens[unknown] if unknown is not None and unknown < len(self.tokens) else None
        best = sorted(range(len(self.tokens)), key=lambda i: -scores[i])
        merges = cuts_in_two([self.tokens[i] for i in best if self.types[i] == NORMAL], self.tokens)
        made = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown_text, byte_fallback=True, fuse_unk=True))
        spaced: list[Any] = [normalizers.Replace(" ", SPACE)]
        back: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if self._of("add_space_prefix", True, bool):
            spaced, back = [normalizers.Prepend(SPACE), *spaced], [*back, decoders.Strip(" ", 1, 0)]
        made.normalizer, made.decoder = normalizers.Sequence(spaced), decoders.Sequence(back)
        return made

    def by_rank(self) -> Tokenizer:
        """GPT-2's."""
        said = self._of("merges", [], list)
        merges = [
            (left, right)
            for left, _, right in ((m[0] + m[1:].partition(" ")[0], "", m[1:].partition(" ")[2]) for m in said if m)
        ]
        vocabulary = {token: i for i, token in enumerate(self.tokens)}
        cut = self._of("pre", "default", str)
        made = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut in TOKENS_ARE_WORDS))
        made.pre_tokenizer, made.decoder = splitter(cut), decoders.ByteLevel()
        return made

    def _begins(self) -> bool:
        """Whether a text begins with bos."""
        by_default = self.model == "llama" or self.settings.get("tokenizer.ggml.pre") in TOKENS_ARE_WORDS
        return self._of("add_bos_token", by_default, bool)

    def _add_special(self, made: Tokenizer) -> None:
        """Tokens that are found in a text before it is cut."""
        of = {kind: [t for t, k in zip(self.tokens, self.types) if k == kind] for kind in (CONTROL, USER_DEFINED)}
        made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in of[CONTROL]])
        made.add_tokens([AddedToken(t, special=False, normalized=False) for t in of[USER_DEFINED]])

    def _add_ends(self, made: Tokenizer) -> None:
        """bos before a text, and eos after it, where the file wants them."""
        wanted = {"bos": self._begins(), "eos": self._of("add_eos_token", False, bool)}
        ids = {name: i for name, i in self.ids.items() if i is not None and wanted.get(name)}
        if any(i >= len(self.tokens) for i in ids.values()):
            raise InputError(
                f"{self.owner}: a special token is none of its {len(self.tokens)} tokens; download it again"
            )
        texts = {name: self.tokens[i] for name, i in ids.items()}
        single = [texts.get("bos"), "$A", texts.get("eos")]
        made.post_processor = processors.TemplateProcessing(
            single=[part for part in single if part], special_tokens=[(texts[name], i) for name, i in ids.items()]
        )

    def _of(self, name: str, default: Any, kind: type) -> Any:
        value = self.settings.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, kind):
            raise InputError(f"{self.owner}: tokenizer.ggml.{name} is no {kind.__name__}; download it again")
        return value

    def _id(self, name: str, default: int | None = None) -> int | None:
        value = self._of(name, -1 if default is None else default, int)
        return value if 0 <= value < 1 << 24 else None

    def _per_token(self, name: str, default: float) -> Sequence[Any]:
        values = self.settings.get(f"tokenizer.ggml.{name}")
        if values is None:
            return [default] * len(self.tokens)
        if not isinstance(values, np.ndarray) or len(values) != len(self.tokens):
            raise InputError(f"{self.owner}: tokenizer.ggml.{name} are not one for each of {len(self.tokens)} tokens")
        return values.tolist()


KINDS = {"llama": Vocabulary.by_score, "gpt2": Vocabulary.by_rank}
