"""The one error a user can cause: it says what was given and what to give instead."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Something the user gave cannot be used. The message names the value and the fix; the command line exits with 2."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean ...` for a word that is not among the known ones, or the list of all when nothing is near."""
    known = sorted(known)
    close = get_close_matches(word, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
