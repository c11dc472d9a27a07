"""Bytes of a file as text, or the reason why they are none.

UTF-8 and UTF-16 with a byte-order mark are read as they are; a file that is text in an older one-byte encoding is read
as Windows-1252. It does not guess between the many other encodings of the world.
"""

from __future__ import annotations

import codecs

from slipstream.core.errors import InputError

NO_CONTROLS = bytes([*b"\t\n\v\f\r\x1b\x08", *range(32, 256)])  # every byte that text may well hold
MOST_ODD = 0.02  # share of control characters above which a file is binary
MOST_FOREIGN = 0.3  # share of undecodable bytes above which it is not a western one-byte encoding


def decode(content: bytes, name: str) -> tuple[str, str]:
    """The text and a note on how it was read ("" for plain UTF-8).

    Raises InputError naming the byte that no text has.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and len(content) % 2 == 0:
        return content.decode("utf-16", errors="replace"), f"{name} was read as UTF-16"
    _refuse_binary(content, name)
    try:
        return content.decode("utf-8-sig"), ""
    except UnicodeDecodeError as error:
        return _decode_odd(content, name, error)


def _refuse_binary(content: bytes, name: str) -> None:
    odd = content.translate(None, NO_CONTROLS)
    if b"\0" in odd or len(odd) > MOST_ODD * len(content):
        first = b"\0" if b"\0" in odd else odd[:1]
        found = f"byte 0x{first.hex()} at offset {content.index(first)}"
        raise InputError(f"{name} is binary, not text: {found}; give a text file")


def _decode_odd(content: bytes, name: str, error: UnicodeDecodeError) -> tuple[str, str]:
    """Text with bytes that are no UTF-8: a damaged UTF-8 file, or one in a one-byte encoding."""
    text = content.decode("utf-8", errors="replace")
    bad = text.count("\N{REPLACEMENT CHARACTER}")
    good = len(text.encode("utf-8", "ignore")) - len(text.encode("ascii", "ignore")) - 3 * bad
    if good // 2 >= bad:
        return text, f"{name} holds {bad} damaged characters (the first at offset {error.start}); they were replaced"
    if bad > MOST_FOREIGN * len(content):
        found = f"byte 0x{content[error.start]:02x} at offset {error.start}"
        raise InputError(f"{name} is no UTF-8 text: {found}; if it is text, convert it: iconv -f ITS-ENCODING -t utf-8")
    return content.decode("cp1252", errors="replace"), f"{name} is no UTF-8; it was read as Windows-1252"
