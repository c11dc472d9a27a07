#!/usr/bin/env python3
"""A stream without end is read in constant memory and at a constant pace: after the first tenth, a recurrent model's process
grows by at most 2 %, and it reads at 60 % at least of the tokens a second that it reads a prompt of 2048 with.

    python bench/endless_stream.py --tokens 1M --params 10M
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from slipstream.bench.bound import Ratio, begin, conclude, options, told
from slipstream.bench.speed import random_tokens, reading
from slipstream.bench.timing import interleaved
from slipstream.core.quantities import bytes_in_words, count, in_words
from slipstream.models.language_model import language_model

BOUND = 1.02
SLOWER = 1 / 0.6
PROMPT = 2048
CHUNK = 1024  # tokens of one prefill


def main() -> int:
    parser = options(__doc__, seconds=0, threads=1)
    parser.add_argument("--arch", default="gated_deltanet", help="a pattern whose state does not grow")
    parser.add_argument("--params", default="300k", help="size of the model")
    parser.add_argument("--tokens", type=count, default=100_000, help="length of the stream, like 1M")
    arguments = parser.parse_args()
    begin(arguments)
    return conclude([told(r, arguments) for r in stream(arguments)], arguments)


@torch.no_grad()
def stream(arguments: argparse.Namespace) -> list[Ratio]:
    """Read chunk by chunk; memory of the process and bytes of the state, at the end over those after the first tenth; and the
    time of a token over that of one of a prompt."""
    model = language_model(arguments.arch, params=arguments.params).eval()
    alone = interleaved({"prompt": reading(model, PROMPT)}, seconds=5, least=3)["prompt"].seconds / PROMPT
    text, state, seen, early = random_tokens(model, 1, CHUNK), model.init_state(1), 0, (0, 0)
    start = time.perf_counter()
    while seen < arguments.tokens:
        _, state = model.prefill(text, state, logits=None)
        seen += CHUNK
        if early == (0, 0) and seen >= arguments.tokens / 10:
            early = resident(), state.nbytes
    each = (time.perf_counter() - start) / seen
    pace = f"{in_words(seen)} tokens at {in_words(1 / each)} a second"
    late = resident(), state.nbytes
    names = f"{arguments.arch} process", f"{arguments.arch} state"
    of_prompt = f"{in_words(1 / each)} tokens a second over {in_words(1 / alone)} of a prompt of {PROMPT}"
    return [Ratio(f"{arguments.arch} time a token", of_prompt, each / alone, SLOWER)] + [
        Ratio(name, f"{bytes_in_words(b)} over {bytes_in_words(a)}, {pace}", b / a, bound)
        for name, a, b, bound in zip(names, early, late, (BOUND, 1.0))
    ]


def resident() -> int:
    """Bytes of memory this process has now (Linux)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmRSS"].split()[0])


if __name__ == "__main__":
    sys.exit(main())
