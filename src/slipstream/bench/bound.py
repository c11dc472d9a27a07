"""A promise about a ratio, and whether this machine's measurement kept it: what the scripts in bench/ print."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import torch

from slipstream.bench.machine import describe, overloaded
from slipstream.core.errors import InputError


@dataclass(frozen=True)
class Ratio:
    """value is promised to be at most `bound`. of: what was divided by what, in words with its numbers."""

    name: str
    of: str
    value: float
    bound: float

    @property
    def kept(self) -> bool:
        return self.value <= self.bound


def options(about: str, seconds: float, threads: int) -> argparse.ArgumentParser:
    """The options every such script takes."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seconds", type=float, default=seconds, help="time for the repetitions of each ratio")
    parser.add_argument("--threads", type=int, default=threads, help="of torch")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def begin(arguments: argparse.Namespace) -> None:
    """Give torch its threads; say so where timings made now would mislead."""
    torch.set_num_threads(arguments.threads)
    if (warning := overloaded()) and not arguments.json:
        print(f"warning: {warning}")


def told(ratio: Ratio, arguments: argparse.Namespace) -> Ratio:
    """Print a ratio as soon as it is known, unless all of them come as JSON."""
    if not arguments.json:
        verdict = "holds" if ratio.kept else "MISSED"
        print(f"{ratio.name:<32} {ratio.value:6.2f}  at most {ratio.bound:g}: {verdict}   {ratio.of}", flush=True)
    return ratio


def run(main: Callable[[], int]) -> NoReturn:
    """A script from its first line to its exit code: a mistake of the user's in one line, Ctrl-C without a trace."""
    try:
        sys.exit(main())
    except InputError as mistake:
        sys.exit(str(mistake))
    except KeyboardInterrupt:
        sys.exit(130)


def conclude(ratios: list[Ratio], arguments: argparse.Namespace) -> int:
    """The exit code: 0 when all ratios are within their bounds, else 1. Says on which machine."""
    machine, missed = describe(measured=False), [r.name for r in ratios if not r.kept]
    if arguments.json:
        facts: dict[str, Any] = {"machine": machine, "ratios": [asdict(r) | {"kept": r.kept} for r in ratios]}
        print(json.dumps(facts | {"warning": overloaded()}, indent=2))
    else:
        print(f"on {machine['cpu']}, {machine['cores']} cores, {arguments.threads} threads, torch {machine['torch']}")
        print(f"missed: {', '.join(missed)}" if missed else f"all {len(ratios)} hold")
    return 1 if missed else 0
