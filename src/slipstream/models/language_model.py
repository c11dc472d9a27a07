"""A language model from a pattern string: embedding, stack, head. Pure or hybrid, the code is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor, nn

from slipstream.core.cards import cards
from slipstream.core.errors import InputError
from slipstream.core.quantities import count
from slipstream.core.state import State
from slipstream.layers.quantised_linear import QuantisedLinear
from slipstream.models.config import ModelConfig
from slipstream.models.conventions import Conventions
from slipstream.models.frontends import TokenEmbedding
from slipstream.models.heads import NextTokenHead
from slipstream.models.pattern import layers
from slipstream.models.quantisation import empty, swap
from slipstream.models.sharing import with_shared
from slipstream.models.stack import Stack

NONE = Conventions()
Logits = Literal["last", "all"]
PIECE = 2048  # tokens of a prompt that are read at once


class LanguageModel(nn.Module):
    """tokens (B T) -> logits (B T V), in the three modes of its mixers.

    tokenizer: the one it was trained with, or None. conventions: where texts end, what a conversation looks like. Checkpoints
    carry both.
    """

    def __init__(
        self, config: ModelConfig, tokenizer: Tokenizer | None = None, conventions: Conventions = NONE
    ) -> None:
        super().__init__()
        self.config, self.tokenizer, self.conventions = config, tokenizer, conventions
        widths = {n: {"d_ff": config.d_ff} for n, c in cards().items() if "d_ff" in c.fields} if config.d_ff else {}
        self.embedding = TokenEmbedding(config)
        specs = with_shared(layers(config.pattern, config.n_layers), config.share_kv, config.value_residual)
        self.stack = Stack(specs, config.d_model, widths, config.norm_eps, config)
        self.head = NextTokenHead(config, self.embedding if config.tie_embeddings else None)
        for mixer in self.stack.mixers():
            for mode, why in mixer.limits.items():
                raise InputError(f"{mixer.name} cannot be part of a language model, which needs {mode}: {why}")
        if config.quantisation is not None:
            swap(self, empty(config.quantisation), config.tie_embeddings)
            self.requires_grad_(False)

    def forward(self, tokens: Int[Tensor, "B T"], packed: Int[Tensor, "N"] | None = None) -> Float[Tensor, "B T V"]:
        """PARALLEL, for training. packed: cu_seqlens of documents in one (1 T) row."""
        return self.head(self.stack(self.embedding(tokens), packed))

    def prefill(
        self,
        tokens: Int[Tensor, "B T"],
        state: State | None = None,
        lengths: Int[Tensor, "B"] | None = None,
        logits: Logits | None = "last",
    ) -> tuple[Float[Tensor, "B L V"] | None, State]:
        """CHUNKED: read tokens from any state; any split gives the same. lengths: rows are right-padded.

        logits: "last" (B 1 V) of each row's last real token, "all" (B T V), or None for the state alone. Without gradients a
        long prompt is read piece by piece, so that memory beyond the state does not grow with it.
        """
        state = self.init_state(tokens.shape[0], tokens.shape[1]) if state is None else state
        if not torch.is_grad_enabled() and lengths is None and logits != "all":
            *pieces, tokens = tokens.split(PIECE, 1)
            for piece in pieces:
                _, state = self.stack.prefill(self.embedding(piece), state)
        h, state = self.stack.prefill(self.embedding(tokens), state, lengths)
        if logits == "last":
            h = _last(h, lengths)
        return (None if logits is None else self.head(h)), state

    def step(self, tokens: Int[Tensor, "B 1"], state: State) -> tuple[Float[Tensor, "B 1 V"], State]:
        """RECURRENT: one token. A growing state must have room: init_state(B, max_len), or reserve."""
        h, state = self.stack.step(self.embedding(tokens), state)
        return self.head(h), state

    def init_state(self, batch_size: int, max_len: int = 0) -> State:
        """A fresh state, with room for max_len tokens where it grows."""
        return self.stack.init_state(batch_size, max_len)

    def reserve(self, state: State, tokens: int) -> State:
        """The state with room for so many more tokens."""
        return self.stack.reserve(state, tokens)

    def state_bytes(self, tokens: int) -> int:
        """Bytes one sequence of so many tokens keeps."""
        return sum(m.state_bytes(tokens) for m in self.stack.mixers())

    def bytes_per_token(self, context: int) -> int:
        """Bytes that writing one token after so many moves: the weights it uses, and its state. Norms are not counted."""
        head = sum(t.nbytes for t in (*self.head.parameters(), *self.head.buffers()))
        return head + sum(m.cost(context, 1, "step").bytes for m in self.stack.mixers())

    def n_parameters(self) -> int:
        """Parameters, a tied matrix counted once, a quantised one as what it was."""
        packed = (m for m in self.modules() if isinstance(m, QuantisedLinear))
        return sum(p.numel() for p in self.parameters()) + sum(m.in_features * m.out_features for m in packed)

    def n_active_parameters(self) -> int:
        """Parameters that one token uses: all but those of experts it did not choose."""
        return self.n_parameters() - sum(m.idle_parameters() for m in self.stack.mixers())

    def weight_decay_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters to decay (matrices) and not to (vectors, and what the mixers name in no_weight_decay)."""
        spared = {
            id(p)
            for m in self.stack.mixers()
            for n, p in m.named_parameters()
            if n.rpartition(".")[2] in m.no_weight_decay
        }
        decay = [p for p in self.parameters() if p.ndim > 1 and id(p) not in spared]
        chosen = {id(p) for p in decay}
        return decay, [p for p in self.parameters() if id(p) not in chosen]

    def save(self, directory: str | Path) -> None:
        """Write a Hugging Face directory: config.json, model.safetensors, tokenizer.json, generation_config.json."""
        from slipstream.models.checkpoint import save

        save(self, directory)


def _last(h: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return h[:, -1:]
    at = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, h.shape[2])
    return h.gather(1, at)


def language_model(
    pattern: str,
    *,
    n_layers: int | None = None,
    d_model: int | None = None,
    vocab_size: int = 256,
    params: int | str | None = None,
    seed: int = 0,
    **settings: object,
) -> LanguageModel:
    """A freshly initialised model, of given widths or of `params` parameters ("3M", within 2 %).

    settings: further fields of ModelConfig. The same seed gives the same weights. Raises InputError for what does not fit.
    """
    from slipstream.models.sizing import sized

    if params is not None:
        config = sized(pattern, count(params), vocab_size, n_layers, d_model, **settings)
    elif n_layers is None or d_model is None:
        raise InputError("give a model its widths (n_layers and d_model) or a number of parameters (params='3M')")
    else:
        config = ModelConfig(pattern=pattern, n_layers=n_layers, d_model=d_model, vocab_size=vocab_size, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LanguageModel(config)
