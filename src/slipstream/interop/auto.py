"""A model of ours as a class of transformers: its generate, its trainers and its pipelines, on any pattern of mixers.

What is kept between calls is our State, under the name past_key_values. Padding may be on either side: rows are put to the left
before they are read, so that no padding reaches a state. Folders are ours, written and read by models/checkpoint.py. Not here:
inputs_embeds, hidden states and attention maps of the layers, static caches, assisted generation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.core.state import State
from slipstream.interop.load import load
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel

try:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise InputError(f'slipstream.hf needs transformers ({error}); pip install "slipstream[hf]"') from None


class SlipstreamConfig(PreTrainedConfig):
    """The fields of ModelConfig, at the top of config.json."""

    model_type = "slipstream"
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "n_layers"}

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)

    def ours(self) -> ModelConfig:
        """Raises InputError where they are no ModelConfig."""
        given = {name: value for name, value in self.__dict__.items() if name in ModelConfig.model_fields}
        return ModelConfig(**given)


class Remembered:
    """What transformers hands from one call to the next: our state, and how many columns of the input are in it."""

    is_compileable = False

    def __init__(self, state: State, columns: int) -> None:
        self.state, self.columns = state, columns

    def get_seq_length(self, *_: Any) -> int:
        return self.columns

    def reorder_cache(self, beams: Tensor) -> None:
        """Rows as a beam search continues them."""
        self.state = self.state.rows(beams)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(len(self.state.length), device=self.state.length.device)
        self.state = self.state.rows(rows.repeat_interleave(repeats))


class SlipstreamForCausalLM(PreTrainedModel, GenerationMixin):
    """`model` is the LanguageModel."""

    config_class = SlipstreamConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True
    _tied_weights_keys = {"model.head.proj.weight": "model.embedding.weight"}

    def __init__(self, config: SlipstreamConfig, model: LanguageModel | None = None) -> None:
        super().__init__(config)
        self.model = LanguageModel(config.ours()) if model is None else model
        config.tie_word_embeddings = self.model.config.tie_embeddings
        config.vocab_size = self.model.config.vocab_size
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *_: Any, dtype: Any = None, torch_dtype: Any = None, **given: Any
    ) -> Any:  # type: ignore[override]
        """A folder of ours. Of transformers' settings, dtype and a device as device_map are followed."""
        dtype = dtype or torch_dtype
        model = load(path, None if dtype == "auto" else dtype)
        config = given.get("config") or SlipstreamConfig(**model.config.model_dump())
        made = cls(config, model)
        for name, token in model.conventions.ids().items():
            setattr(made.generation_config, name, token)
        place = given.get("device_map")
        return made.to(place).eval() if isinstance(place, str | torch.device) and place != "auto" else made.eval()

    def save_pretrained(self, directory: str | Path, *_: Any, **__: Any) -> None:  # type: ignore[override]
        """As slipstream saves it."""
        self.model.save(directory)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Mixers initialise themselves."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> Any:
        return self.model.embedding

    def get_output_embeddings(self) -> Any:
        return self.model.head.proj

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: Remembered | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """What is not in the memory yet."""
        read = past_key_values.columns if past_key_values else 0
        rest = {"past_key_values": past_key_values, "attention_mask": attention_mask}
        return {"input_ids": input_ids[:, read:], **rest, "use_cache": True, "logits_to_keep": 1}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Remembered | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and with use_cache what is remembered after these tokens. labels: shifted here, -100 for none."""
        mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :].bool()
        mask = None if mask is None or bool(mask.all()) else mask
        if past_key_values is None and not use_cache and mask is None:
            logits, kept = self.model(input_ids), None
        else:
            logits, kept = self._read(input_ids, mask, past_key_values, logits_to_keep == 1 and labels is None)
        loss = (
            None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        )
        shown = logits[:, -logits_to_keep:] if logits_to_keep else logits
        return CausalLMOutputWithPast(loss=loss, logits=shown, past_key_values=kept)

    def _read(
        self, tokens: Tensor, mask: Tensor | None, past: Remembered | None, last: bool
    ) -> tuple[Tensor, Remembered]:
        """From a state to the next; past is consumed."""
        T, lengths, order = tokens.shape[1], None, None
        if mask is not None:
            lengths, order = mask.sum(1), (~mask).long().argsort(dim=1, stable=True)
            tokens = tokens.gather(1, order)
        state = self.model.init_state(len(tokens), T) if past is None else self.model.reserve(past.state, T)
        columns = past.columns + T if past else T
        if T == 1 and mask is None:
            logits, state = self.model.step(tokens, state)
            return logits, Remembered(state, columns)
        logits, state = self.model.prefill(tokens, state, lengths, "last" if last else "all")
        assert logits is not None, "logits were asked for"
        if order is not None and not last:
            logits = torch.zeros_like(logits).scatter(1, order[..., None].expand_as(logits), logits)
        return logits, Remembered(state, columns)


AutoConfig.register("slipstream", SlipstreamConfig, exist_ok=True)
AutoModelForCausalLM.register(SlipstreamConfig, SlipstreamForCausalLM, exist_ok=True)
