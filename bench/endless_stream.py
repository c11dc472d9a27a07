"""A stream without end through a recurrent model holds constant memory.

    python bench/endless_stream.py                       a million tokens, in pieces of 4096, through a small mamba2
    python bench/endless_stream.py --tokens 100k --arch gated_deltanet

Prints the process's memory along the way. Exits 1 when it has grown by more than 16 MiB since the first tenth.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch

import slipstream as ss
from slipstream.core.quantities import count, in_words

PIECE, ALLOWED = 4096, 16


def resident() -> float:
    """MiB this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


@torch.no_grad()
def main(arch: str, tokens: int) -> int:
    model = ss.language_model(arch, params="300k").eval()
    random = torch.Generator().manual_seed(0)
    state, seen, kept, started = model.init_state(1), 0, [], time.perf_counter()
    while seen < tokens:
        piece = torch.randint(256, (1, min(PIECE, tokens - seen)), generator=random)
        _, state = model.prefill(piece, state, logits=None)
        seen += piece.shape[1]
        if len(kept) < 10 * seen // tokens:
            kept.append(resident())
            rate = seen / (time.perf_counter() - started)
            now = f"{in_words(seen):>6} tokens  {kept[-1]:8.1f} MiB  state {state.nbytes:,} bytes"
            print(f"{now}  {rate:,.0f} tokens/s", flush=True)
    grown = max(kept) - kept[0]
    print(json.dumps({"arch": arch, "tokens": seen, "grown_mib": round(grown, 1), "allowed_mib": ALLOWED}))
    return grown > ALLOWED


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="mamba2")
    parser.add_argument("--tokens", type=count, default=1_000_000)
    given = parser.parse_args()
    sys.exit(main(given.arch, given.tokens))
