"""A config.json while it is read: every field that is asked for is checked, every field that nobody asked for is refused.

A checkpoint's settings come from strangers, and one that is overlooked gives another model without a word. So there is an
explicit list of what changes no logits, and all the rest must be known to the family.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable
from typing import Any

from slipstream.core.errors import InputError, nearest

WIDEST = 1 << 24  # of any width or count: what is larger is no model but a mistake or an attack
NEEDED: Any = object()
LARGEST = sys.float_info.max
INFINITE = {"Infinity": math.inf, "-Infinity": -math.inf}
BENIGN_NAMES = (  # what changes no logits: names, training, defaults of generation, how transformers runs it
    """
    architectures auto_map model_type transformers_version _name_or_path torch_dtype dtype name_or_path use_cache return_dict
    initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop dropout classifier_dropout
    pretraining_tp max_position_embeddings bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    output_attentions output_hidden_states output_router_logits router_aux_loss_coef router_jitter_noise id2label label2id
    problem_type finetuning_task task_specific_params chunk_size_feed_forward attn_implementation _attn_implementation
    _attn_implementation_autoset cache_implementation gradient_checkpointing unsloth_version unsloth_fixed language use_kernels
    tokenizer_class transformers_weights initializer_cutoff_factor is_llama_config transformers.js_config
    """
)
BENIGN = frozenset(BENIGN_NAMES.split())
NEUTRAL = {  # what published files say with these values, and what another would change in any family
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "use_mrope": False,
    "rope_interleaved": False,
}


class Fields:
    """owner: whose settings these are, for messages. A field that is null counts as absent, as in transformers."""

    def __init__(self, table: dict[str, Any], owner: str) -> None:
        self.table = {name: value for name, value in table.items() if value is not None}
        self.owner, self.asked = owner, set[str]()

    def has(self, name: str) -> bool:
        return name in self.table

    def whole(self, name: str, default: Any = NEEDED, least: int = 1, most: int = WIDEST) -> Any:
        """A whole number within bounds."""
        value = self._get(name, default)
        if value is default and not self.has(name):
            return value
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self._wrong(name, value, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str, default: Any = NEEDED, most: float = LARGEST) -> Any:
        """A finite number, no larger than `most`."""
        value = self._get(name, default)
        if value is default and not self.has(name):
            return value
        if type(value) not in (int, float) or not abs(value) <= most:
            raise self._wrong(name, value, "a finite number" + (f" up to {most:g}" if most < LARGEST else ""))
        return value

    def flag(self, name: str, default: Any = NEEDED) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def word(self, name: str, known: Collection[str], default: Any = NEEDED) -> str:
        """One of the words that are known here."""
        value = self._get(name, default)
        if not isinstance(value, str) or value not in known:
            raise self._wrong(name, value, f"one of {', '.join(sorted(known))}")
        return value

    def words(self, name: str, known: Collection[str], count: int | None, default: Any = NEEDED) -> list[str]:
        """So many of them, one a layer; any number of them when count is None."""
        value = self._get(name, default)
        if (
            not isinstance(value, list)
            or len(value) != (count or len(value))
            or not all(isinstance(v, str) for v in value)
        ):
            raise self._wrong(name, value, f"a list of {count} words, one a layer" if count else "a list of words")
        if unknown := sorted(set(value) - set(known)):
            raise self._wrong(name, unknown[0], f"one of {', '.join(sorted(known))}")
        return value

    def wholes(self, name: str, default: Any = NEEDED) -> list[int]:
        """A list of whole numbers, such as the layers of a kind."""
        value = self._get(name, default)
        if not isinstance(value, list) or not all(type(v) is int and 0 <= v <= WIDEST for v in value):
            raise self._wrong(name, value, "a list of whole numbers")
        return value

    def numbers(self, name: str, count: int, default: Any = NEEDED) -> list[float]:
        """So many numbers, which may be infinite (JSON has no word for it, transformers writes {"__float__": "Infinity"})."""
        value = self._get(name, default)
        if not isinstance(value, list):
            raise self._wrong(name, value, f"a list of {count} numbers")
        found: list[Any] = [INFINITE.get(str(v.get("__float__"))) if isinstance(v, dict) else v for v in value]
        if len(found) != count or not all(
            type(v) in (int, float) and (abs(v) <= LARGEST or abs(v) == math.inf) for v in found
        ):
            raise self._wrong(name, value, f"a list of {count} numbers")
        return [float(v) for v in found]

    def table_of(self, name: str) -> Fields:
        """A table inside the table; empty when it is absent."""
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise self._wrong(name, value, "a table")
        return Fields(value, f"{self.owner}.{name}")

    def only(self, name: str, *allowed: Any) -> None:
        """Absent, or one of these: all that is supported."""
        value = self._get(name, allowed[0])
        if not any(type(value) is type(a) and value == a for a in allowed):
            raise InputError(
                f"{self.owner} has {name} = {value!r:.80}, which slipstream does not support (it reads {allowed[0]!r})"
            )

    def ignore(self, *names: str) -> None:
        """Fields of this family that change no logits."""
        self.asked.update(names)

    def finish(self) -> None:
        """Raises InputError for a field that nobody asked for."""
        for name, value in NEUTRAL.items():
            self.only(name, value)
        if self.has("quantization_config"):
            raise InputError(
                f"{self.owner} is of a quantised checkpoint, which slipstream cannot read; take one that is not"
            )
        left = [n for n in self.table if n not in self.asked and n not in BENIGN]
        if left:
            raise InputError(
                f"{self.owner} has a field {left[0]!r} = {self.table[left[0]]!r:.80} that slipstream does not know: it may "
                f"change what the model computes ({nearest(left[0], self.asked)})"
            )

    def _get(self, name: str, default: Any) -> Any:
        self.asked.add(name)
        if name not in self.table and default is NEEDED:
            raise InputError(f"{self.owner} lacks {name!r}; the checkpoint is not complete")
        return self.table.get(name, default)

    def _wrong(self, name: str, value: Any, wanted: str) -> InputError:
        return InputError(f"{self.owner}: {name} = {value!r:.80} must be {wanted}")


def one_of_each(values: Iterable[Any], what: str) -> Any:
    """The one value that all have. Raises InputError when they differ."""
    found = list(dict.fromkeys(values))
    if len(found) != 1:
        raise InputError(f"layers differ in {what} ({', '.join(map(str, found[:3]))}): this family has one for all")
    return found[0]
