"""The settings of a comparison. Free of torch, so that mistakes are told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from slipstream.core.config import Config
from slipstream.core.quantities import Count, Integers, Seconds
from slipstream.models.archs import Archs, separate

EIGHT = (
    "lstm",
    "retnet",
    "gated_linear_attention",
    "mamba2",
    "gated_deltanet",
    "sliding_window",
    "attention",
    "3*gated_deltanet, attention",
)


class CompareConfig(Config):
    """One run of `slipstream compare`."""

    data: str | None = Field(
        None, description="a text file, a folder, - for standard input; a novel comes with slipstream"
    )
    archs: Archs = Field(
        list(EIGHT),
        min_length=1,
        description="names or patterns: a,b,c or 'a; 3*b, c; d' [default: eight, from LSTM to a hybrid]",
    )
    params: Count = Field(300_000, gt=0, description="parameters of each, embeddings included, equal within 2 %")
    tokens: Count | None = Field(None, gt=0, description="tokens each is trained on [default: what the budget allows]")
    context: int | None = Field(
        None, ge=8, description="tokens of one training sequence [default: 256, less for a short text]"
    )
    budget: Seconds = Field(300.0, gt=0, description="time for everything, like 5m or 2h")
    equal: Literal["tokens", "time"] = Field(
        "tokens", description="train each on the same tokens, or for the same time"
    )
    seeds: int = Field(1, ge=1, description="how often each is trained, from different weights and data orders")
    measure: Annotated[list[str], BeforeValidator(separate)] = Field(
        ["quality", "recall", "speed"], description="what is measured"
    )
    lengths: Integers = Field([512, 2048, 8192], description="prompt lengths whose reading is timed")
    contexts: Integers = Field([512, 8192], description="contexts after which writing a token is timed")
    tokenizer: str = Field("bytes", description="bytes, bpe:4096 to train one, or the path of a tokenizer.json")
    batch_size: int = Field(
        4, ge=1, description="sequences of one training step: few, so that few tokens make many steps"
    )
    optimizer: Literal["adamw", "muon"] = Field("muon", description="muon learns more from few tokens; or adamw")
    lr: float = Field(1e-2, gt=0, description="highest learning rate, the same for all; adamw wants about 3e-3")
    jobs: int | None = Field(
        None, ge=1, description="architectures trained side by side, a thread each [default: the cores]"
    )
    out: Path | None = Field(None, description="folder of the results [default: runs/compare-NAME-OF-DATA]")
    fresh: bool = Field(False, description="start over where a comparison is already")

    @field_validator("measure")
    @classmethod
    def _measures(cls, measure: list[str]) -> list[str]:
        unknown = set(measure) - {"quality", "recall", "speed"}
        if unknown:
            raise ValueError(f"{sorted(unknown)[0]!r} is not measured; choose from quality, recall, speed")
        if measure == ["speed"]:
            raise ValueError("speed is timed on trained models: add quality, or use slipstream bench")
        return measure

    @property
    def settings(self) -> dict[str, object]:
        """All that results depend on; architectures, seeds and jobs may change between calls that share a folder."""
        return self.model_dump(mode="json", exclude={"archs", "seeds", "measure", "jobs", "out", "fresh"})
