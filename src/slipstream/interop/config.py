"""The settings of an export. Free of torch, so that help is quick."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from slipstream.core.config import Config


class ExportConfig(Config):
    """One call of `slipstream export`."""

    run: str = Field(description="the folder of a run or of another model, or a name on the Hugging Face hub")
    format: str = Field(
        "hf", description="what to write: hf for transformers' own classes, gguf for llama.cpp, slipstream for ours"
    )
    out: Path = Field(description="the folder to write; for gguf the file")
    family: str | None = Field(
        None, description="the model_type to write as (default: the first that can be this model)"
    )
    dtype: str | None = Field(None, description="of the weights, such as bfloat16 (default: as they are)")
    as_json: bool = Field(False, description="print what was written as one JSON object")
