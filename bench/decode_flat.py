#!/usr/bin/env python3
"""The next token after 8192 tokens takes at most 1.15 times as long as after 512, in every mixer whose state does not grow.

python bench/decode_flat.py --archs mamba2,gated_deltanet
"""

from __future__ import annotations

import sys

import torch

from slipstream.bench.bound import Ratio, begin, conclude, options, told
from slipstream.bench.speed import STEPS, writing
from slipstream.bench.timing import interleaved, ratio
from slipstream.core.cards import cards
from slipstream.models.language_model import language_model

BOUND = 1.15
N_LAYERS, D_MODEL = 2, 256


def main() -> int:
    flat = [c.name for c in cards().values() if c.state_growth in ("constant", "window")]
    parser = options(__doc__, seconds=5, threads=1)
    parser.add_argument("--archs", default=",".join(flat), help="mixers")
    parser.add_argument("--near", type=int, default=512, help="tokens of the short context")
    parser.add_argument("--far", type=int, default=8192, help="tokens of the long one")
    arguments = parser.parse_args()
    begin(arguments)
    found = [flatness(a, arguments.near, arguments.far, arguments.seconds) for a in arguments.archs.split(",")]
    return conclude([told(r, arguments) for r in found], arguments)


@torch.no_grad()
def flatness(name: str, near: int, far: int, seconds: float) -> Ratio:
    """Milliseconds a token after each context, in turns."""
    model = language_model(name, n_layers=N_LAYERS, d_model=D_MODEL).eval()
    found = interleaved({str(n): writing(model, n) for n in (near, far)}, seconds, least=5)
    a, b = found[str(near)], found[str(far)]
    ms = [1e3 * t.seconds / STEPS for t in (b, a)]
    return Ratio(name, f"{ms[0]:.3f} ms over {ms[1]:.3f} ms", ratio(b, a), BOUND)


if __name__ == "__main__":
    sys.exit(main())
