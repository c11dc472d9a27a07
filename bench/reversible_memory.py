#!/usr/bin/env python3
"""Training with reversible layers keeps the activations of one layer, whatever the depth: bytes that autograd keeps in one
step, and peak memory of a process, against the ordinary stack.

    python bench/reversible_memory.py --arch "gated_deltanet, attention" --depths 2,8,32
"""

from __future__ import annotations

import argparse
import sys

import torch

from slipstream.bench.bound import Ratio, begin, conclude, options, told
from slipstream.bench.memory import peak_bytes
from slipstream.bench.saved import most_saved
from slipstream.core.quantities import bytes_in_words
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel

D_MODEL = 64
SAVED, PEAK = 1.01, 1.5  # of the deepest over the shallowest; a process also holds the gradients of more weights


def main() -> int:
    parser = options(__doc__, seconds=0, threads=1)
    parser.add_argument("--arch", default="attention", help="a mixer or a pattern")
    parser.add_argument("--depths", default="2,4,8,16,32", help="layers")
    parser.add_argument("--context", type=int, default=2048, help="tokens of the one sequence trained on")
    arguments = parser.parse_args()
    begin(arguments)
    depths = sorted(int(d) for d in arguments.depths.split(","))
    plain, ours = ([step(d, kind, arguments) for d in depths] for kind in (False, True))
    ratios = []
    for what, bound, a, b in zip(("kept by autograd", "peak of the process"), (SAVED, PEAK), zip(*plain), zip(*ours)):
        ratios += [over(f"{d} layers: {what}", y, x, "ordinary", 1.0) for d, x, y in zip(depths, a, b)]
        name = f"{depths[-1]} over {depths[0]} layers: {what}"
        ratios.append(over(name, b[-1], b[0], f"{depths[0]} layers", bound))
    return conclude([told(r, arguments) for r in ratios], arguments)


def step(depth: int, reversible: bool, arguments: argparse.Namespace) -> tuple[int, int]:
    """Bytes kept by autograd, and by which one training step raises a process's memory."""
    config = ModelConfig(pattern=arguments.arch, n_layers=depth, d_model=D_MODEL, reversible=reversible)
    tokens = torch.zeros(1, arguments.context, dtype=torch.long)
    return most_saved(LanguageModel(config), tokens), peak_bytes(config, arguments.context, training=True)


def over(name: str, a: int, b: int, of: str, bound: float) -> Ratio:
    return Ratio(name, f"reversible {bytes_in_words(a)} over {of} {bytes_in_words(b)}", a / b, bound)


if __name__ == "__main__":
    sys.exit(main())
