"""The settings of generation. Free of torch, so that help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from slipstream.core.config import Config
from slipstream.core.quantities import Count


class Sampling(Config):
    """How the next token is chosen. The filters apply in this order, as in Hugging Face's generate."""

    repetition_penalty: float = Field(1.0, gt=0, description="above 1: tokens that have occurred become less likely")
    temperature: float = Field(0.8, ge=0, description="0 always takes the likeliest token")
    top_k: int | None = Field(None, ge=1, description="choose among so many likeliest tokens")
    top_p: float | None = Field(None, gt=0, le=1, description="choose among the likeliest of this probability together")
    min_p: float | None = Field(None, ge=0, le=1, description="leave out what is below this share of the likeliest")


class Task(Config):
    """What is continued, with what, how far."""

    run: str = Field(
        description="the folder of a run or of another model, a model.safetensors file, or org/name on the hub"
    )
    prompt: str | None = Field(None, description="the text to continue; - reads standard input")
    chat: bool = Field(False, description="the prompt is what a user says to the model, by its chat template")
    max_new_tokens: Count = Field(200, ge=0, description="tokens to write at most")


class Running(Config):
    """How a model is run; what was trained does not depend on it."""

    dtype: str | None = Field(None, description="of the weights, such as float32 (default: as they are stored)")

    cache: str | None = Field(
        None,
        description="what attention keeps: a cache policy such as h2o:512 (slipstream list --policies), or several with commas, "
        "one a layer (default: as the model says)",
    )
    prefill_policy: str | None = Field(
        None, description="which keys a prompt reads: a prefill policy such as minference (default: as the model says)"
    )

    quantise: Literal["int8", "int4"] | None = Field(
        None,
        description="keep the matrices in so few bits a weight: faster, a little worse (slipstream quantise says how much)",
    )

    def policies(self) -> dict[str, str | list[str]]:
        """Those that are given: one for all layers, or a list of them."""
        given = {"cache": self.cache, "prefill_policy": self.prefill_policy}
        parts = {name: [part.strip() for part in said.split(",")] for name, said in given.items() if said is not None}
        return {name: several if len(several) > 1 else several[0] for name, several in parts.items()}


class Machine(Config):
    """What of the machine is used."""

    threads: int | None = Field(
        None, ge=1, description="CPU threads (default: 1 or all cores, whichever is measured to be faster)"
    )


class GenerateConfig(Machine, Running, Sampling, Task):
    """One call of `slipstream generate`."""

    stop: list[str] = Field(default_factory=list, description="end before this text")
    seed: int | None = Field(None, ge=0, description="the same seed writes the same text (default: another every time)")
    save_state: Path | None = Field(None, description="keep what was read and written in this file, to continue later")
    from_state: Path | None = Field(None, description="continue from such a file")
    as_json: bool = Field(False, description="print one JSON object at the end instead of the text as it comes")
