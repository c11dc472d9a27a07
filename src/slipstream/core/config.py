"""Settings: frozen pydantic models whose mistakes are told in one line, with the nearest name."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from slipstream.core.errors import InputError, nearest


class Config(BaseModel):
    """Base of every settings class: frozen, no unknown field, the same schema in Python, YAML, JSON and on the command line."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(self._in_words(error)) from None

    @classmethod
    def _in_words(cls, error: ValidationError) -> str:
        owner = cls.__qualname__.removesuffix(".Config")
        lines = []
        for e in error.errors():
            field = ".".join(map(str, e["loc"]))
            if e["type"] == "extra_forbidden":
                lines.append(f"{owner} has no field {field!r}; {nearest(field, cls.model_fields)}")
            elif e["type"] == "missing":
                lines.append(f"{owner} needs a value for {field!r}")
            else:
                said = e["msg"].removeprefix("Value error, ")
                lines.append(f"{owner}: {field} = {e['input']!r}: {said}" if field else f"{owner}: {said}")
        more = [f"and {len(lines) - 3} more such mistakes"] if len(lines) > 3 else []
        return "; ".join(lines[:3] + more)


class MixerConfig(Config):
    """What every mixer's settings begin with."""

    d_model: int  # width of the residual stream


def heads(d_model: int, n_heads: int | None, head_dim: int = 64) -> int:
    """Number of heads: as given, else about d_model / head_dim; it must divide d_model.

    Raises InputError with the nearest counts that divide.
    """
    if n_heads is None:
        most = max(1, d_model // head_dim)
        return next(n for n in range(most, 0, -1) if d_model % n == 0)
    if n_heads < 1 or d_model % n_heads:
        fit = [n for n in range(1, d_model + 1) if d_model % n == 0]
        near = sorted(sorted(fit, key=lambda n: abs(n - n_heads))[:3])
        raise InputError(f"d_model {d_model} does not divide into n_heads {n_heads}; the nearest that do: {near}")
    return n_heads
