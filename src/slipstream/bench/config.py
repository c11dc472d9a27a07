"""The settings of `slipstream bench`. Free of torch, so that mistakes are told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from slipstream.core.config import Config
from slipstream.core.quantities import Count, Integers, Seconds
from slipstream.models.archs import Archs

What = Literal["speed", "state", "memory", "recall", "mqar", "copying"]
FIVE = ("lstm", "mamba2", "gated_deltanet", "sliding_window", "attention")


def _words(text: str | list[str]) -> list[str]:
    """speed,recall -> two words, from one line or several."""
    return [w.strip() for line in ([text] if isinstance(text, str) else text) for w in line.split(",")]


class BenchConfig(Config):
    """One run of `slipstream bench`."""

    archs: Archs = Field(
        list(FIVE), min_length=1, description="names or patterns: a,b,c or 'a; 3*b, c; d' [default: five families]"
    )
    measure: Annotated[list[What], BeforeValidator(_words)] = Field(
        ["speed", "state"], min_length=1, description="speed, state, memory (peak of a prefill), recall, mqar, copying"
    )
    params: Count = Field(3_000_000, gt=0, description="parameters of each, equal within 2 %, but for the recall tasks")
    lengths: Integers = Field([512, 2048, 8192], min_length=1, description="prompt lengths whose reading is timed")
    contexts: Integers = Field([512, 8192], min_length=1, description="contexts after which writing a token is timed")
    data: str | None = Field(None, description="text that recall plants its facts in (default: a novel)")
    seconds: Seconds = Field(60.0, gt=0, description="time for the timings of all, and for each recall task of each")
    threads: int = Field(1, ge=1, description="threads of the timings: more are slower for models this small")
    seed: int = Field(0, ge=0, description="of the weights and the examples")
    out: Path | None = Field(None, description="folder to write results.jsonl and machine.json to")
    as_json: bool = Field(False, description="print the records as JSON lines instead of tables")
