"""Tokens as text while they come: whole characters only, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

RECENT = 16  # shown tokens that are remembered, for decoders that look at what is before a token


class Characters:
    """Text of tokens, given out when its characters are whole. shown, held: the last tokens that are and are not out."""

    def __init__(self, tokenizer: Tokenizer, shown: Sequence[int] = (), held: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.shown = list(shown)[-RECENT:]
        self.held: list[int] = []
        self.stream = DecodeStream(ids=self.shown, skip_special_tokens=False)
        for token in held:
            self.feed(token)

    def feed(self, token: int) -> str:
        """The text that is whole now: "" in the middle of a character."""
        self.held.append(token)
        piece = self.stream.step(self.tokenizer, token) or ""
        if piece:
            self.shown, self.held = [*self.shown, *self.held][-RECENT:], []
        return piece


class StopStrings:
    """Lets text pass up to the first stop string, however it is cut into pieces.

    What may be the beginning of a stop string is held back. Of several, the one that is complete first ends the text,
    and of those that are complete at the same character the longest: so the cuts make no difference.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [s for s in stops if s]
        self.held = ""
        self.ended = False

    def feed(self, piece: str) -> str:
        """The text that may be shown now. `ended` is set when a stop string is complete."""
        text = self.held + piece
        found = [(at + len(s), at) for s in self.stops if (at := text.find(s)) >= 0]
        if found:
            self.ended, self.held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, s) for s in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when nothing more comes."""
        text, self.held = self.held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is a beginning of stop."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
