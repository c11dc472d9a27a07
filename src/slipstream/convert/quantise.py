"""A trained model with its matrices in 8 or 4 bits a weight: a fourth or a seventh of the bytes that a token has to read.

    small = quantise(model, to="int4")

Which matrices: see models/quantisation.py; how they are packed: ops/quantised_linear.py. Rounding is to the nearest, weight by
weight: no text is read to choose what is rounded which way.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Literal

from torch import Tensor, nn

from slipstream.core.errors import InputError
from slipstream.layers.quantised_linear import QuantisedLinear
from slipstream.models.config import Quantisation
from slipstream.models.language_model import LanguageModel
from slipstream.models.quantisation import matrices, swap


def quantise(
    model: LanguageModel,
    to: Literal["int8", "int4"] = "int8",
    group: int = 32,
    on_progress: Callable[[float], None] = lambda share: None,
) -> LanguageModel:
    """The quantised model, which shares nothing with the given one and cannot be trained. on_progress: told the share done.

    Raises InputError for a model that is quantised already, has nothing to quantise, or has weights that are no numbers.
    """
    how = Quantisation(to=to, group=group)
    _refuse(model)
    made = _with_its_weights(model)
    total, done = sum(linear.weight.numel() for _, _, linear in matrices(model)), 0

    def make(weight: Tensor, bias: Tensor | None) -> QuantisedLinear:
        nonlocal done
        packed = QuantisedLinear.of(weight, bias, how.bits, how.group)
        done += weight.numel()
        on_progress(min(1.0, done / total))
        return packed

    swap(made, make, model.config.tie_embeddings)
    made.config = model.config.model_copy(update={"quantisation": how})
    _cut_loose(made)
    return made


def stored_bytes(model: LanguageModel) -> int:
    """Of all that is kept of a model, each tensor once."""
    return sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values())


def _refuse(model: LanguageModel) -> None:
    if (already := model.config.quantisation) is not None:
        raise InputError(f"this model is {already.to} already; quantise the one it was made from")
    if next(matrices(model), None) is None:
        raise InputError(f"no matrix of {model.config.pattern!r} at d_model {model.config.d_model} is large enough")


def _with_its_weights(model: LanguageModel) -> LanguageModel:
    """A copy of all but the tensors, which would be made only to be dropped."""
    same = [*model.parameters(), *model.buffers(), model.tokenizer]
    return deepcopy(model, {id(kept): kept for kept in same})


def _cut_loose(model: LanguageModel) -> None:
    """What stayed as it was becomes the model's own, without gradients."""
    own: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fresh = own.setdefault(id(parameter), nn.Parameter(parameter.detach().clone(), requires_grad=False))
                module._parameters[name] = fresh
        for name, buffer in module._buffers.items():
            if buffer is not None and not isinstance(module, QuantisedLinear):
                module._buffers[name] = buffer.clone()
