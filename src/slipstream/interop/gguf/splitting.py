"""How byte-level vocabularies cut a text into words before they merge within them, by llama.cpp's names for it.

Each is a list of expressions; what one of them matches becomes a word, and so does what lies between two matches. The next one
cuts further. Source: llama.cpp's llama-vocab.cpp.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split

from slipstream.core.errors import InputError, nearest

DIGIT = r"\p{N}"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
ENDINGS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
LLAMA3 = ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST
QWEN2 = ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST
QWEN35 = ENDINGS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + SPACES
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s"
SLASHED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES
TEKKEN = CASED % ("", "") + r"|\p{N}" + SLASHED
GPT4O = CASED % (ENDINGS + "?", ENDINGS + "?") + r"|\p{N}{1,3}" + SLASHED
HAN = "[一-龥぀-ゟ゠-ヿ]+"
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + SPACES
)

PUNCTUATION = r"[\p{P}\$\+<=>\^~\|%s]+"
SPLITS = {
    "gpt-2 mpt olmo jais trillion granite-docling phi-2 exaone4 jina-es jina-de jina-v2-es jina-v2-de gigachat": [
        WORDS
    ],
    "smollm starcoder refact command-r codeshell exaone minerva-7b": [DIGIT, WORDS],
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral lfm2 dbrx smaug-bpe chatglm-bpe glm4": [LLAMA3],
    "qwen2 stablelm2 deepseek-r1-qwen hunyuan megrez": [QWEN2],
    "qwen35": [QWEN35],
    "tekken": [TEKKEN],
    "gpt-4o llama4": [GPT4O],
    "deepseek-v3 hunyuan-dense": [r"\p{N}{1,3}", HAN, DEEPSEEK3],
    "default": [PUNCTUATION % "", WORDS, r"\p{N}+", "[0-9][0-9][0-9]"],
    "falcon": [PUNCTUATION % "`", WORDS, "[0-9][0-9][0-9]"],
}
BY_NAME = {name: expressions for names, expressions in SPLITS.items() for name in names.split()}
TOKENS_ARE_WORDS = frozenset(
    ["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2", "tekken"]
)  # never merged in


def splitter(name: str) -> PreTokenizer:
    """What cuts a text so. Raises InputError for a name that is not known."""
    if name not in BY_NAME:
        raise InputError(f"no way to cut words is called {name!r:.60} (tokenizer.ggml.pre); {nearest(name, BY_NAME)}")
    cuts = [Split(Regex(expression), "isolated") for expression in BY_NAME[name]]
    return Sequence([*cuts, ByteLevel(add_prefix_space=False, use_regex=False)])


def name_of(cutting: dict[str, Any], merges: bool) -> str:
    """llama.cpp's name for the pre_tokenizer of a tokenizer.json. merges: whether it has any, without which cuts do nothing.

    Raises InputError when it has none.
    """
    ours = _settings(cutting)
    if ours == _settings(_said(ByteLevel(add_prefix_space=False))) or (not merges and ours.get("type") == "ByteLevel"):
        return "gpt-2"
    for name in BY_NAME:
        if ours == _settings(_said(splitter(name))):
            return name
    raise InputError(
        "the model's tokenizer cuts words as none of llama.cpp's does: tokenizers of bytes and bpe:N can be written"
    )


def _said(cutting: PreTokenizer) -> dict[str, Any]:
    return json.loads(cutting.__getstate__())


def _settings(cutting: Any) -> Any:
    """Without what changes no tokens."""
    if isinstance(cutting, list):
        return [_settings(part) for part in cutting]
    if isinstance(cutting, dict):
        return {name: _settings(part) for name, part in cutting.items() if name != "trim_offsets"}
    return cutting
