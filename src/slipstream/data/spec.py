"""How a tokenizer is named in settings: bytes, bpe:4096, or the path of a tokenizer.json. Free of heavy imports."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from slipstream.core.quantities import count


def check(spec: str) -> str:
    """The spec itself. Raises ValueError unless it is one of the three."""
    kind, _, size = spec.partition(":")
    if kind == "bpe" and size:
        if count(size) <= 256:
            raise ValueError("a byte-level BPE vocabulary begins with the 256 bytes; ask for more, like bpe:4096")
    elif spec != "bytes" and not spec.endswith(".json"):
        raise ValueError("write bytes, bpe:4096 or the path of a tokenizer.json")
    return spec


TokenizerSpec = Annotated[str, AfterValidator(check)]
