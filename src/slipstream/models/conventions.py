"""How a checkpoint wants to be spoken to: where it begins and ends, and what a conversation looks like as text.

Read from and written to the files that Hugging Face directories have: generation_config.json, tokenizer_config.json and
chat_template.jinja. A template is a program of a stranger's: it runs in jinja's sandbox, without files, modules or changes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slipstream.core.errors import InputError
from slipstream.core.files import read_table, write_text

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
LARGEST = 1 << 20  # bytes of a template
SAMPLING = {"do_sample": True, "temperature": 0.8, "max_new_tokens": 200}


@dataclass(frozen=True)
class Conventions:
    """eos_ids: tokens that end a text, any of them. special: the texts of special tokens, by their names there."""

    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    chat_template: str | None = None
    special: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Conventions:
        """What the files of a folder say; what they do not say is absent."""
        generation, tokenizer = _table(folder / "generation_config.json"), _table(folder / "tokenizer_config.json")
        config = _table(folder / "config.json")

        def ids(name: str) -> tuple[int, ...]:
            said = generation.get(name, config.get(name))
            return tuple(i for i in (said if isinstance(said, list) else [said]) if type(i) is int and i >= 0)

        template = _text(folder / "chat_template.jinja") or _template(tokenizer.get("chat_template"))
        special = {n: _content(tokenizer.get(n)) for n in SPECIAL}
        first = {n: next(iter(ids(n)), None) for n in ("bos_token_id", "pad_token_id")}
        return cls(
            ids("eos_token_id"),
            first["bos_token_id"],
            first["pad_token_id"],
            template,
            {n: text for n, text in special.items() if text is not None},
        )

    def write(self, folder: Path, has_tokenizer: bool) -> None:
        """The files, as transformers reads them."""
        generation = SAMPLING | self.ids()
        write_text(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")
        if has_tokenizer and (self.special or self.chat_template):
            about = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                **self.special,
            }
            write_text(folder / "tokenizer_config.json", json.dumps(about, indent=2, ensure_ascii=False) + "\n")
        if self.chat_template is not None:
            write_text(folder / "chat_template.jinja", self.chat_template)

    def ids(self) -> dict[str, Any]:
        """Token ids by the names that config.json and generation_config.json have for them."""
        eos = list(self.eos_ids) if len(self.eos_ids) > 1 else next(iter(self.eos_ids), None)
        said = {"bos_token_id": self.bos_id, "eos_token_id": eos, "pad_token_id": self.pad_id}
        return {n: i for n, i in said.items() if i is not None}

    def prompt(self, messages: Sequence[dict[str, Any]], answer: bool = True, **variables: Any) -> str:
        """A conversation as the text that the model was trained on: [{"role": "user", "content": "Hello"}].

        answer: end where the model's answer begins. variables: what a template takes besides, such as tools.
        Raises InputError when there is no template, and for what it does not accept.
        """
        if self.chat_template is None:
            raise InputError("this model has no chat template: give it text to continue instead of messages")
        from jinja2 import TemplateError

        try:
            template = _sandbox().from_string(self.chat_template)
            return template.render(messages=list(messages), add_generation_prompt=answer, **self.special, **variables)
        except (TemplateError, TypeError, ValueError, OverflowError, RecursionError, MemoryError) as error:
            raise InputError(f"the model's chat template does not take these messages: {error}") from None


def _sandbox() -> Any:
    """As transformers renders templates: whitespace trimmed around blocks, loops with break, raise_exception."""
    from datetime import datetime

    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, **how: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **how)

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = to_json
    sandbox.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return sandbox


def _table(path: Path) -> dict[str, Any]:
    return read_table(path) if path.is_file() else {}


def _text(path: Path) -> str | None:
    """Raises InputError when it is too large or no text."""
    if not path.is_file():
        return None
    if path.stat().st_size > LARGEST:
        raise InputError(f"{path} is {path.stat().st_size} bytes, too many for what its name says")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text; download it again") from None


def _template(said: Any) -> str | None:
    """A template, or of several by name the one called default."""
    if isinstance(said, list):
        said = next((t.get("template") for t in said if isinstance(t, dict) and t.get("name") == "default"), None)
    return said if isinstance(said, str) else None


def _content(token: Any) -> str | None:
    """The text of a special token, which may stand in a table of its properties."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
