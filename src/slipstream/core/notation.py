"""A printed equation for the eye: the plain text of a mixer's file with Greek letters, subscripts and signs.

Files keep ascii, which is easy to type and to search. No replacement is longer than what it replaces.
"""

from __future__ import annotations

import re
from collections import Counter

NAMES = (
    "alpha beta gamma delta epsilon eps zeta eta theta kappa lambda lam mu nu xi rho sigma tau phi psi omega pi inf "
    "Gamma Delta Theta Lambda Lam Sigma Phi Psi Omega"
)
GREEK = dict(zip(NAMES.split(), "αβγδεεζηθκλλμνξρστφψωπ∞ΓΔΘΛΛΣΦΨΩ"))
LOW = dict(zip("0123456789+-=()aehijklmnoprstuvx", "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₐₑₕᵢⱼₖₗₘₙₒₚᵣₛₜᵤᵥₓ"))
HIGH = dict(zip("0123456789+-=()TnNdiKH*", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ᵀⁿᴺᵈⁱᴷᴴ*"))
SIGNS = {" * ": " ⊙ ", " . ": " · ", "<=": "≤", ">=": "≥", "sqrt(": "√(", "->": "→"}
SUBSCRIPT = r"_(\{[^{}]*\}|[A-Za-z0-9]\b)|(?<=\b[A-Za-z])_(\w+)"  # in names of words, such as rms_norm, _ stays
LETTER = "(?<![A-Za-z])(%s)(?![A-Za-z])"


def typeset(equation: str, width: int = 0) -> str:
    """The equation in Unicode. What stood in one column still does; lines wider than `width` are broken at their gaps."""
    lines = [_columns(line) for line in equation.split("\n")]
    shared = Counter(at for line in lines for at, _, _ in line)
    shown = [_line([(at if shared[at] > 1 else 0, gap, _signs(text)) for at, gap, text in line]) for line in lines]
    return "\n".join(re.sub(r"(?<=\S) {3,}", "\n    ", line) if 0 < width < len(line) else line for line in shown)


def _columns(line: str) -> list[tuple[int, int, str]]:
    """(where it starts, spaces before it, text) of each part."""
    return [(m.start(2), len(m[1]), m[2]) for m in re.finditer(r"(^ *|  +)(\S+(?: \S+)*)", line)]


def _line(parts: list[tuple[int, int, str]]) -> str:
    line = ""
    for at, gap, text in parts:
        line = (line + " " * gap).ljust(at) + text
    return line


def _signs(text: str) -> str:
    for sign, shown in SIGNS.items():
        text = text.replace(sign, shown)
    text = re.sub(LETTER % "sum", "Σ", text)
    text = re.sub(r"([A-Za-z])~", "\\1\N{COMBINING TILDE}", text)
    text = re.sub(LETTER % "|".join(sorted(GREEK, key=len, reverse=True)), lambda m: GREEK[m[1]], text)
    text = re.sub(SUBSCRIPT, lambda m: _moved(m, LOW), text)
    return re.sub(r"\^(\{[^{}]*\}|\([^()]*\)|-?\w+)", lambda m: _moved(m, HIGH), text)


def _moved(found: re.Match[str], alphabet: dict[str, str]) -> str:
    """Lowered or raised, where every character of it can be; spaces go."""
    inner = found[found.lastindex or 0].strip("{}").replace(" ", "")
    inner = inner[1:-1] if inner[:1] == "(" and inner[-1:] == ")" else inner
    return "".join(alphabet[c] for c in inner) if inner and all(c in alphabet for c in inner) else found[0]
