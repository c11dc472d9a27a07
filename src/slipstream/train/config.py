"""The settings of a training run: what is trained, how, and where it is kept. Free of torch, so that help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from slipstream.core.config import Config
from slipstream.core.quantities import Count, Seconds
from slipstream.data.spec import TokenizerSpec
from slipstream.models.archs import Arch
from slipstream.models.config import Wiring

PARAMS = 1_000_000
TOKENS = 600_000  # about one pass over the novel, a few minutes on one core
LEARNING_RATES = {"adamw": 3e-3, "muon": 6e-3}  # for models of about a million parameters


class Subject(Config):
    """What is trained, on what."""

    data: str | None = Field(None, description="a text file, a folder, or - for standard input (default: a novel)")
    tokenizer: TokenizerSpec = Field(
        "bytes", description="bytes, bpe:4096 to train one, or the path of a tokenizer.json"
    )
    context: int | None = Field(None, ge=1, description="tokens of one sequence (default: 256, less for a short text)")
    arch: Arch = Field("3*gated_deltanet, attention", description="a mixer's name or a pattern of them")
    params: Count | None = Field(None, description="size of the model, like 3M (default: 1M)")
    n_layers: int | None = Field(None, ge=1, description="blocks (default: from --params)")
    d_model: int | None = Field(None, ge=1, description="width (default: from --params)")


class Recipe(Config):
    """How it is trained. Steps, batches and learning rates follow from this alone: two models can be given the same."""

    tokens: Count | None = Field(None, description="tokens to train on (default: 600k, without end under --budget)")
    budget: Seconds | None = Field(None, gt=0, description="time to train, like 5m; such a run is not the same twice")
    batch_size: int = Field(8, ge=1, description="sequences of one step")
    grad_accumulation: int = Field(1, ge=1, description="parts a batch is cut into: less memory, same result")
    lr: float | None = Field(None, gt=0, description="highest learning rate (default: 3e-3, 6e-3 for muon)")
    schedule: Literal["cosine", "wsd"] = Field("cosine", description="cosine, or wsd: warm-up, stable, decay")
    warmup: float = Field(0.05, ge=0, le=1, description="share of the run in which the learning rate rises")
    decay: float = Field(0.2, ge=0, le=1, description="share of the run in which wsd falls")
    weight_decay: float = Field(0.1, ge=0, description="of matrices; never of biases, norms and decay rates")
    grad_clip: float = Field(1.0, gt=0, description="longest gradient")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="adamw, or muon for the hidden matrices")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto is bfloat16 on CUDA only")
    seed: int = Field(0, ge=0, description="of the weights and of the order of the data")
    eval_every: int | None = Field(None, ge=1, description="steps between validations (default: a tenth of the run)")
    eval_tokens: Count | None = Field(
        None, ge=1, description="held-out tokens of a validation, 16 times as many at the end (default: 1 % of the run)"
    )

    @model_validator(mode="after")
    def _divides(self) -> Recipe:
        if self.batch_size % self.grad_accumulation:
            parts = f"grad_accumulation {self.grad_accumulation} parts"
            raise ValueError(f"batch_size {self.batch_size} does not divide into {parts}")
        return self

    @property
    def highest_lr(self) -> float:
        return self.lr or LEARNING_RATES[self.optimizer]

    @property
    def most_tokens(self) -> float:
        """Tokens after which the run ends, if its time is not up before."""
        return self.tokens or (TOKENS if self.budget is None else float("inf"))


class TrainConfig(Recipe, Wiring, Subject):
    """One run of `slipstream train`."""

    out: Path | None = Field(None, description="folder of the run (default: runs/NAME-OF-DATA)")
    fresh: bool = Field(False, description="start over where a run is already")
    save_every: Seconds = Field(30.0, ge=0, description="time between checkpoints; 0 for one every step")
    threads: int | None = Field(
        None, ge=1, description="CPU threads (default: 1 or all cores, whichever is measured to be faster)"
    )
    device: str = Field("auto", description="auto (CUDA when there is one), cpu, cuda, cuda:1, mps")
    as_json: bool = Field(False, description="print the result as JSON")
