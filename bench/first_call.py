#!/usr/bin/env python3
"""What compiled kernels cost the first time: at most 15 seconds where none is there yet, a tenth of a second once they are.

Both are the time of a model's first prompt and token over that of its second, in a process of its own; the kernels go to an empty
folder.

    python bench/first_call.py --arch "3*gated_deltanet, attention"
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile

from slipstream.bench.bound import Ratio, begin, conclude, options, told

COLD, WARM = 15.0, 0.1  # seconds
CHILD = """
import json, sys, time, torch
import slipstream as ss
arch, threads = json.load(sys.stdin)
torch.set_num_threads(threads)
model, tokens, taken = ss.language_model(arch, n_layers=4, d_model=128), torch.zeros(1, 64, dtype=torch.long), []
with torch.no_grad():
    for _ in range(2):
        start = time.perf_counter()
        _, state = model.prefill(tokens, model.init_state(1, 65))
        model.step(tokens[:, :1], state)
        taken.append(time.perf_counter() - start)
print(json.dumps(taken))
"""


def main() -> int:
    parser = options(__doc__, seconds=0, threads=2)
    parser.add_argument(
        "--arch", default="3*gated_deltanet, attention; mamba2; mamba; rwkv7", help="patterns, with ; between"
    )
    arguments = parser.parse_args()
    begin(arguments)
    found = [told(r, arguments) for arch in arguments.arch.split(";") for r in first_calls(arch.strip(), arguments)]
    return conclude(found, arguments)


def first_calls(arch: str, arguments: argparse.Namespace) -> list[Ratio]:
    with tempfile.TemporaryDirectory() as folder:
        cold, warm = (extra_seconds(arch, arguments.threads, folder) for _ in range(2))
    return [
        Ratio(f"{arch}, cold", "seconds more than the second call", cold, COLD),
        Ratio(f"{arch}, warm", "seconds more than the second call", warm, WARM),
    ]


def extra_seconds(arch: str, threads: int, folder: str) -> float:
    """First call less second, with the kernels of that folder."""
    run = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps([arch, threads]), capture_output=True, text=True, check=True,
        env=os.environ | {"SLIPSTREAM_CACHE": folder},
    )  # fmt: skip
    first, second = json.loads(run.stdout)
    return first - second


if __name__ == "__main__":
    sys.exit(main())
