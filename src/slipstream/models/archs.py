"""Several architectures on one line: names or patterns, told apart. Read without torch."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from slipstream.core.errors import InputError
from slipstream.models.pattern import parse


def separate(text: str | list[str]) -> list[str]:
    """From one line, split at semicolons if there are any, else at commas outside brackets; several lines are one each.

    Raises ValueError for `3*a, b` without a semicolon, which could mean one hybrid or two architectures.
    """
    if not isinstance(text, str):
        return separate(text[0]) if len(text) == 1 else [part.strip() for part in text]
    if ";" not in text and "," in text and re.search(r"\d\s*\*", text):
        raise ValueError("a pattern has commas of its own; put ';' between architectures, and after one that is alone")
    parts = text.split(";") if ";" in text else re.split(r",(?![^(]*\))", text)
    return [part.strip() for part in parts if part.strip()]


def _known(arch: str) -> str:
    """It can be read as a pattern."""
    try:
        parse(arch)
    except InputError as error:
        raise ValueError(str(error)) from None
    return arch


def _all_known(archs: list[str]) -> list[str]:
    """Named twice is named once."""
    return list(dict.fromkeys(_known(arch) for arch in archs))


Arch = Annotated[str, AfterValidator(_known)]
Archs = Annotated[list[str], BeforeValidator(separate), AfterValidator(_all_known)]
