"""The settings of `slipstream bench`. Free of torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from slipstream.core.config import Config
from slipstream.core.quantities import Count, Integers, Seconds
from slipstream.models.archs import Archs


class BenchConfig(Config):
    """One run of `slipstream bench`: random weights, so it needs no data."""

    archs: Archs = Field(
        ["attention", "mamba2", "gated_deltanet"], min_length=1, description="names or patterns: a,b,c or 'a; 3*b, c; d'"
    )
    params: Count = Field(3_000_000, gt=0, description="parameters of each, equal within 2 %")
    lengths: Integers = Field([512, 2048, 8192], description="prompt lengths whose reading is timed")
    contexts: Integers = Field([512, 8192], description="contexts after which writing a token is timed")
    budget: Seconds = Field(60.0, gt=0, description="time for all of it")
    threads: int | None = Field(None, ge=1, description="CPU threads [default: all cores]")
    out: Path | None = Field(None, description="folder for results.jsonl [default: none is written]")
    as_json: bool = Field(False, description="print the records as JSON lines")
