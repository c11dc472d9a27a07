"""What a language model is made of: all of config.json."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from slipstream.core.config import Config
from slipstream.models.presets import expanded


class Wiring(Config):
    """How layers are joined, whatever they are."""

    share_kv: int = Field(1, ge=1, description="attention layers of a kind that share one cache of keys and values")
    value_residual: bool = Field(
        False, description="layers after the first of a kind mix its values with their own (RWKV-7)"
    )
    reversible: bool = Field(
        False, description="two residual streams: training keeps the activations of one layer, whatever the depth"
    )
    norm: Literal["rms", "rms_plus_one", "layer", "layer_no_bias"] = Field(
        "rms", description="of the residual stream: rms_plus_one keeps weights less one (Gemma), layer has a bias"
    )
    norm_place: Literal["before", "after", "around", "after_attention", "stream"] = Field(
        "before",
        description="of every mixer: what it reads, what it says before that is added (OLMo 2), or both (Gemma 2); "
        "after_attention: after in blocks that begin with attention, before in all others (OLMo Hybrid); "
        "stream: what it reads, which then is the stream that it adds to (MiniMax-01)",
    )
    carry_scale: float = Field(
        1.0, gt=0, description="with norm_place stream, factor on the normed stream to which a mixer adds (MiniMax-01)"
    )
    embedding_scale: float = Field(1.0, gt=0, description="factor on the embeddings (Gemma: the root of d_model)")
    embedding_norm: bool = Field(False, description="a norm on the embeddings, of the same kind (RWKV, BLOOM)")
    residual_scale: float = Field(1.0, gt=0, description="factor on what every mixer says before it is added (Granite)")
    head_bias: bool = Field(False, description="a bias on the output head")
    logit_scale: float = Field(1.0, gt=0, description="factor on the logits (Granite, Cohere)")
    logit_cap: float | None = Field(
        None, gt=0, description="keeps logits within +- c, by c tanh(logit / c), after the factor (Gemma 2)"
    )
    skip_every: int | None = Field(
        None, ge=1, description="mixture of depths: tokens may go round the layers of every so many-th block"
    )
    skip_capacity: float = Field(0.5, gt=0, le=1, description="share of the tokens that are to pass such a layer")


class Quantisation(Config):
    """How the matrices of a model are kept that is run and no longer trained."""

    to: Literal["int8", "int4"] = Field("int8", description="bits of a weight")
    group: int = Field(32, description="inputs of a row with one scale: 32, or 64 for int8")

    @model_validator(mode="after")
    def _can_be_packed(self) -> Quantisation:
        if self.group not in (32, 64)[: self.bits // 4]:
            raise ValueError(f"{self.to} has groups of {'32 or 64' if self.bits == 8 else '32'}, not {self.group}")
        return self

    @property
    def bits(self) -> Literal[8, 4]:
        return 8 if self.to == "int8" else 4


class ModelConfig(Wiring):
    """Everything needed to build the model again, without its weights."""

    pattern: Annotated[str, AfterValidator(expanded)] = Field(
        description="which mixers, in which order: [count*]mixer[(key=value)][/feedforward], ..."
    )
    n_layers: int = Field(ge=1, description="blocks; the pattern is repeated to this many")
    d_model: int = Field(ge=1, description="width of the residual stream")
    vocab_size: int = Field(256, ge=1, description="tokens of the vocabulary; 256 for bytes")
    d_ff: int | None = Field(
        None, ge=1, description="inner width of the feed-forwards; None for each one's own default"
    )
    tie_embeddings: bool = Field(True, description="use the embedding matrix as output head too")
    norm_eps: float = Field(1e-6, gt=0, description="added under the root of every norm")
    quantisation: Quantisation | None = Field(None, description="how its matrices are kept; None as they were trained")
    context: int | None = Field(
        None, ge=1, description="tokens that it was trained to read at once, where known; nothing is cut there"
    )
