#!/usr/bin/env python3
"""Reading eight times as many tokens takes at most nine times as long, and nine times the memory, in every mixer that is
linear in the length.

    python bench/linear_in_length.py --archs mamba2,gated_deltanet
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch

from slipstream.bench.bound import Ratio, begin, conclude, options, told
from slipstream.bench.memory import peak_bytes
from slipstream.bench.timing import interleaved, ratio
from slipstream.core.cards import cards
from slipstream.core.registry import mixer
from slipstream.models.config import ModelConfig

D_MODEL, BOUND_PER_DOUBLING = 256, 9 / 8  # 9 for the 8 times of 1024 to 8192


def main() -> int:
    mixers = [c for c in cards().values() if c.remembers and c.family != "feedforward"]
    linear = [c.name for c in mixers if c.train_order == "T"]
    parser = options(__doc__, seconds=10, threads=1)
    parser.add_argument("--archs", default=",".join(linear), help="mixers")
    parser.add_argument("--short", type=int, default=1024, help="tokens of the short sequence")
    parser.add_argument("--long", type=int, default=8192, help="tokens of the long one")
    arguments = parser.parse_args()
    begin(arguments)
    return conclude(
        [told(r, arguments) for name in arguments.archs.split(",") for r in ratios(name, arguments)], arguments
    )


def ratios(name: str, arguments: argparse.Namespace) -> Iterator[Ratio]:
    """Time and peak memory of one mixer."""
    short, long = arguments.short, arguments.long
    bound = BOUND_PER_DOUBLING * long / short
    a, b = times(name, short, long, arguments.seconds)
    yield Ratio(f"{name} time", f"{1e3 * b.seconds:.1f} ms over {1e3 * a.seconds:.1f} ms", ratio(b, a), bound)
    config = ModelConfig(pattern=f"{name}/none", n_layers=1, d_model=D_MODEL)
    low, high = peak_bytes(config, short), peak_bytes(config, long)
    yield Ratio(f"{name} memory", f"{high / 2**20:.1f} MiB over {low / 2**20:.1f} MiB", high / max(low, 1), bound)


@torch.no_grad()
def times(name: str, short: int, long: int, seconds: float):
    """Of the mixer's forward, batch 1."""
    layer = mixer(name, d_model=D_MODEL).eval()
    xs = {n: torch.randn(1, n, D_MODEL, generator=torch.Generator().manual_seed(0)) for n in (short, long)}
    found = interleaved({str(n): lambda x=x: layer(x) for n, x in xs.items()}, seconds, least=3)
    return found[str(short)], found[str(long)]


if __name__ == "__main__":
    sys.exit(main())
