"""A model of ours as a Hugging Face folder that transformers loads with its own classes.

A family is asked to say the model in its settings, which are then read back: what came out different is what the family
cannot say, and the model is not written. So no family needs to know all that a model of ours might have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from slipstream.core.errors import InputError
from slipstream.core.files import replacing, write_text
from slipstream.core.mixer import Mixer
from slipstream.interop.hf.family import Family, all_families, family
from slipstream.interop.hf.fields import Fields
from slipstream.interop.hf.read import parameter_names, without_storage
from slipstream.interop.hf.weights import Rule, bound
from slipstream.layers.rope_scaling import rope_scaling
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel

RUNNING = {"cache", "prefill_policy", "chunk_size", "balance_loss", "z_loss", "bias_rate"}  # how it is run and trained
SAID_ELSEWHERE = {"pattern", "d_ff", "share_kv", "context"}  # by the mixers themselves; or nothing that is computed
SHARD = 5 << 30  # bytes of tensors in one file


def save_hf(model: LanguageModel, folder: Path, model_type: str | None = None, shard: int = SHARD) -> str:
    """Write the folder and return the model_type, the first that can say the model if none is asked for.

    Raises InputError with what no family can say.
    """
    name, table = expressed(model, model_type)
    rules = bound(family(name).rules(model), parameter_names(model), name)
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    about = {"architectures": [family(name).architecture], "model_type": name, "dtype": dtype, **table}
    _write_tensors(model, rules, folder, shard)
    if model.tokenizer is not None:
        write_text(folder / "tokenizer.json", model.tokenizer.to_str(pretty=True))
    model.conventions.write(folder, model.tokenizer is not None)
    write_text(folder / "config.json", json.dumps(about, indent=2) + "\n")
    return name


def expressed(model: LanguageModel, model_type: str | None = None) -> tuple[str, dict[str, Any]]:
    """The family that can say the model, and its settings for it. Raises InputError when none can, with the nearest's reason."""
    if model_type is not None:
        family(model_type)
    kinds = {
        name: kind
        for name, kind in all_families().items()
        if model_type in (None, name) and name == kind.model_types[0]
    }
    failures: list[tuple[int, str, str]] = []
    for name, kind in kinds.items():
        try:
            table = kind.hf_config(model)
            unlike = differences(model, _read_back(kind, name, table))
        except InputError as error:
            failures.append((1 << 30, name, str(error)))
            continue
        if not unlike:
            return name, table
        failures.append((len(unlike), name, unlike[0]))
    _, name, why = min(failures)
    raise InputError(
        f"no family of Hugging Face models is this model; nearest is {name}: {why}. "
        "--format slipstream writes it as it is, for transformers too (import slipstream.hf)"
    )


def _read_back(kind: Family, name: str, table: dict[str, Any]) -> ModelConfig:
    fields = Fields(table, name)
    config = kind.config(fields)
    fields.finish()
    return config


def differences(model: LanguageModel, config: ModelConfig) -> list[str]:
    """In words, what is not as in a model of this config: settings, mixers, shapes."""
    ours, theirs = model.config.model_dump(), config.model_dump()
    found = [f"{n} is {ours[n]}, not {theirs[n]}" for n in ours if n not in SAID_ELSEWHERE and ours[n] != theirs[n]]
    other = without_storage(config)
    for mine, its in zip(model.stack.places(), other.stack.places()):
        found += [
            f"{mine.mixer.name} in block {mine.at.partition('.')[0]}: {d}" for d in _unlike(mine.mixer, its.mixer)
        ]
    if model.stack.tied != other.stack.tied:
        found.append("layers that have one set of weights (tied) are others in this family")
    if model.stack.asides != other.stack.asides:
        found.append("mixers that speak to the next one alone (to_next) are others in this family")
    shapes = {n: t.shape for n, t in other.state_dict().items()}
    own = {n: t.shape for n, t in model.state_dict().items()}
    return found + [
        f"{n} is {_size(own, n)}, not {_size(shapes, n)}" for n in own | shapes if own.get(n) != shapes.get(n)
    ]


def _unlike(mine: Mixer, its: Mixer) -> Iterator[str]:
    """None stands for a default that follows from other widths: what was written for it is compared by shapes."""
    if mine.name != its.name:
        yield f"this family has {its.name} there"
        return
    ours, theirs = mine.config.model_dump(), its.config.model_dump()
    for name in ours:
        derived = ours[name] is None and name in DERIVED
        if name not in RUNNING | IN_SHAPES and not derived and _plain(name, ours[name]) != _plain(name, theirs[name]):
            yield f"{name} is {ours[name]}, this family has {theirs[name]}"


def _plain(name: str, value: Any) -> Any:
    """Positions may be written in several ways that mean one scaling."""
    return str(rope_scaling(value)) if name == "rope_scaling" else value


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


IN_SHAPES = {"d_ff", "d_expert"}  # said by the tensors' shapes, which are compared
DERIVED = _words(
    "n_heads n_kv_heads n_v_heads head_dim k_head_dim v_head_dim kv_rank q_rank nope_head_dim rope_head_dim dt_rank d_inner "
    "ssm_d_inner ssm_heads"
)


def _size(shapes: dict[str, Any], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "absent"


def _write_tensors(model: LanguageModel, rules: list[Rule], folder: Path, shard: int) -> None:
    """One file, or several of about `shard` bytes with an index of which tensor is where. Only one is in memory at a time."""
    tensors = model.state_dict()
    parts = list(_shards(rules, tensors, shard))
    where: dict[str, str] = {}
    for i, part in enumerate(parts, 1):
        name = "model.safetensors" if len(parts) == 1 else f"model-{i:05}-of-{len(parts):05}.safetensors"
        theirs = {n: t for rule in part for n, t in zip(rule.theirs, rule.write([tensors[o] for o in rule.ours]))}
        with replacing(folder / name) as temporary:
            save_file({n: t.detach().contiguous() for n, t in theirs.items()}, temporary, {"format": "pt"})
        where |= dict.fromkeys(theirs, name)
    if len(parts) > 1:
        total = sum(t.nbytes for n, t in tensors.items() if n in {o for r in rules for o in r.ours})
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _shards(rules: list[Rule], tensors: dict[str, Tensor], most: int) -> Iterator[list[Rule]]:
    held, part = 0, list[Rule]()
    for rule in rules:
        size = sum(tensors[n].nbytes for n in rule.ours)
        if part and held + size > most:
            yield part
            held, part = 0, []
        held, part = held + size, [*part, rule]
    yield part
