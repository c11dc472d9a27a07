"""A family of models as Hugging Face has it: what its settings and its tensors are here, and back.

Each file in families/ has one. It states two translations of settings and one table of tensors, which is used both ways.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import Any, ClassVar

from slipstream.core.errors import InputError, nearest
from slipstream.core.packages import import_all
from slipstream.interop.hf import families
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.weights import Rule
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel


class Family(ABC):
    """Abstract. model_types: those of config.json that it answers to; the first is what it writes."""

    model_types: ClassVar[tuple[str, ...]]
    architecture: ClassVar[str]  # the class of transformers, for config.json
    found: ClassVar[dict[str, Family]] = {}

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        for name in cls.model_types:
            Family.found[name] = cls()

    @abstractmethod
    def config(self, hf: Fields) -> ModelConfig:
        """Ours of theirs. Every field that matters must be asked for: what is left over is refused."""

    @abstractmethod
    def hf_config(self, model: LanguageModel) -> dict[str, Any]:
        """Theirs of ours, as well as it can be said: the caller reads it back, and refuses when that is another model.

        The model may be without storage. Raises InputError where not even its mixers are this family's.
        """

    @abstractmethod
    def rules(self, model: LanguageModel) -> list[Rule]:
        """The table of tensors, for all blocks of this model (which may be without storage)."""

    def spelling(self, name: str) -> str:
        """What the rules call a tensor of a file: for families whose files have several names for one."""
        return name

    def surplus(self, name: str, config: ModelConfig) -> bool:
        """Whether a tensor of theirs that no rule names may be left unread: the model computes nothing with it."""
        return name.endswith("rotary_emb.inv_freq")


@cache
def all_families() -> dict[str, Family]:
    """Every family: model_type -> Family."""
    import_all(families)
    return dict(sorted(Family.found.items()))


def family(model_type: Any) -> Family:
    """The family that answers to a model_type. Raises InputError with the nearest."""
    if not isinstance(model_type, str) or model_type not in all_families():
        raise InputError(
            f"no family of models is called {model_type!r:.60}; {nearest(str(model_type), all_families())}"
        )
    return all_families()[model_type]
