"""What a language model is made of: all of config.json."""

from __future__ import annotations

from pydantic import Field

from slipstream.core.config import Config


class Wiring(Config):
    """How layers are joined, whatever they are."""

    share_kv: int = Field(1, ge=1, description="attention layers of a kind that share one cache of keys and values")
    reversible: bool = Field(
        False, description="two residual streams: training keeps the activations of one layer, whatever the depth"
    )


class ModelConfig(Wiring):
    """Everything needed to build the model again, without its weights."""

    pattern: str = Field(description="which mixers, in which order: [count*]mixer[(key=value)][/feedforward], ...")
    n_layers: int = Field(ge=1, description="blocks; the pattern is repeated to this many")
    d_model: int = Field(ge=1, description="width of the residual stream")
    vocab_size: int = Field(256, ge=1, description="tokens of the vocabulary; 256 for bytes")
    d_ff: int | None = Field(
        None, ge=1, description="inner width of the feed-forwards; None for each one's own default"
    )
    tie_embeddings: bool = Field(True, description="use the embedding matrix as output head too")
    norm_eps: float = Field(1e-6, gt=0, description="added under the root of every norm")
