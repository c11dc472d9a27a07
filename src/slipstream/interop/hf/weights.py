"""A table that says which tensors of a checkpoint are which of ours, read in both directions.

    rename("self_attn.q_proj", "mixers.0.qkv.q_proj")          a module: its weight, its bias, whatever it has
    cut("self_attn.qkv", ("q", "k", "v"), sizes)               one of theirs is several of ours, by rows
    stack("experts.{}.w1.weight", "up", 8)                     several of theirs are one of ours
    Rule(theirs, ours, read, write)                            anything that can be undone

Import and export use the same rules, so that a round trip gives the same bits. A rule whose name ends at a module holds for
every tensor our model has in it; rules of which our model has nothing are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slipstream.core.errors import InputError

Tensors = Sequence[Tensor]
Change = Callable[[Tensors], Tensors]


def as_they_are(tensors: Tensors) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Rule:
    """theirs, ours: names of modules or tensors. read makes ours of theirs, write theirs of ours; each undoes the other.
    otherwise: how the same tensor of ours is read of files that have others for it; never written."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    read: Change = as_they_are
    write: Change = as_they_are
    otherwise: Rule | None = None

    def inside(self, theirs: str, ours: str) -> Rule:
        """The rule below these names."""
        return replace(
            self,
            theirs=tuple(f"{theirs}.{n}" for n in self.theirs),
            ours=tuple(f"{ours}.{n}" for n in self.ours),
            otherwise=self.otherwise and self.otherwise.inside(theirs, ours),
        )

    def tensors(self, names: Collection[str]) -> list[Rule]:
        """One rule for every tensor that our model has below it."""
        first = self.ours[0]
        ends = [n[len(first) :] for n in names if n == first or n.startswith(first + ".")]
        return [
            replace(self, theirs=tuple(n + end for n in self.theirs), ours=tuple(n + end for n in self.ours))
            for end in ends
        ]


def rename(theirs: str, ours: str) -> Rule:
    """The same under another name."""
    return Rule((theirs,), (ours,))


def renames(theirs: str, ours: str, names: str) -> list[Rule]:
    """Several modules that are called alike, inside theirs and inside ours."""
    return [rename(f"{theirs}.{n}", f"{ours}.{n}") for n in names.split()]


def cut(theirs: str, ours: Sequence[str], sizes: Sequence[int], dim: int = 0) -> Rule:
    """One of theirs is several of ours, one after another along dim."""
    return Rule(
        (theirs,),
        tuple(ours),
        read=lambda tensors: [t.contiguous() for t in tensors[0].split(list(sizes), dim)],
        write=lambda tensors: [torch.cat(list(tensors), dim)],
    )


def join(theirs: Sequence[str], ours: str, sizes: Sequence[int], dim: int = 0) -> Rule:
    """Several of theirs are one of ours, one after another along dim."""
    return Rule(
        tuple(theirs),
        (ours,),
        read=lambda tensors: [torch.cat(list(tensors), dim)],
        write=lambda tensors: [t.contiguous() for t in tensors[0].split(list(sizes), dim)],
    )


def stack(theirs: str, ours: str, count: int) -> Rule:
    """theirs.format(0), theirs.format(1), ... are the slices of ours along a new first axis. Names of tensors, not modules."""
    return Rule(
        tuple(theirs.format(i) for i in range(count)),
        (ours,),
        read=lambda tensors: [torch.stack(list(tensors))],
        write=lambda tensors: [t.contiguous() for t in tensors[0].unbind(0)],
    )


def changed(theirs: str, ours: str, read: Callable[[Tensor], Tensor], write: Callable[[Tensor], Tensor]) -> Rule:
    """One of theirs is one of ours after a change that can be undone, such as a transposition."""
    return Rule(
        (theirs,),
        (ours,),
        read=lambda tensors: [read(tensors[0]).contiguous()],
        write=lambda tensors: [write(tensors[0]).contiguous()],
    )


def fixed(ours: str, value: Tensor) -> Rule:
    """A tensor of ours that they do not store, since it is always this. Another cannot be written."""

    def write(tensors: Tensors) -> Tensors:
        if not bool((tensors[0] == value.to(tensors[0])).all()):
            raise InputError(
                f"{ours} was trained to other values than {value.unique().tolist()}, and this family has none"
            )
        return []

    return Rule((), (ours,), read=lambda _: [value], write=write)


def rows(theirs: str, ours: str, order: Tensor) -> Rule:
    """Rows in another order: row i of ours is row order[i] of theirs."""
    back = order.argsort()
    return changed(theirs, ours, lambda t: t[order], lambda t: t[back])


def in_blocks(rules: Iterable[Rule], blocks: Iterable[int], theirs: str = "model.layers") -> list[Rule]:
    """Rules of a block, for these blocks."""
    rules = list(rules)
    return [rule.inside(f"{theirs}.{i}", f"stack.blocks.{i}") for i in blocks for rule in rules]


def bound(rules: Iterable[Rule], names: Collection[str], owner: str) -> list[Rule]:
    """The rules for every tensor of our model. Raises InputError for one that has no name there, or two."""
    found = [tensor for rule in rules for tensor in rule.tensors(names)]
    ours = [n for rule in found for n in rule.ours]
    if missing := sorted(set(names) - set(ours)):
        raise InputError(f"{owner} has no name for {missing[0]} ({len(missing)} of our tensors)")
    if len(ours) != len(set(ours)):
        raise ValueError(f"{owner} names {next(n for n in ours if ours.count(n) > 1)} twice")
    return found
