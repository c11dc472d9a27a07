"""The settings of conversions. Free of torch, so that help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from slipstream.core.config import Config
from slipstream.core.quantities import Count


class QuantiseConfig(Config):
    """One call of `slipstream quantise`."""

    run: Path = Field(description="the folder of a run, or a model.safetensors file")
    out: Path = Field(description="folder for the quantised model")
    to: Literal["int8", "int4"] = Field("int8", description="bits of a weight")
    group: int = Field(32, description="weights of a row with one scale: 32, or 64 for int8")
    text: str | None = Field(
        None, description="a text file to measure both models on (default: what the run held out of its own)"
    )
    eval_tokens: Count = Field(32768, ge=1, description="tokens of it that are read, spread over it")
    as_json: bool = Field(False, description="print the facts as JSON")
