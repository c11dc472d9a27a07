"""Does writing a token cost the same after a long text? Decode ms at context 8192 over 512, one layer, batch 1.

    python bench/decode_flat.py             every mixer; bound 1.15 for those whose state does not grow

Medians of interleaved repetitions. Exits 1 when a bound is missed.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch

import slipstream as ss

CONTEXTS, D_MODEL, BOUND, REPEATS, TOKENS = (512, 8192), 256, 1.15, 21, 16


@torch.no_grad()
def state_after(mixer: ss.Mixer, context: int) -> ss.State:
    _, state = mixer.prefill(torch.randn(1, context, D_MODEL), mixer.init_state(1, context))
    return mixer.reserve(state, TOKENS + 1)


@torch.no_grad()
def milliseconds(mixer: ss.Mixer, state: ss.State) -> float:
    x, state = torch.randn(1, 1, D_MODEL), state.clone()
    _, state = mixer.step(x, state)
    start = time.perf_counter()
    for _ in range(TOKENS):
        _, state = mixer.step(x, state)
    return 1e3 * (time.perf_counter() - start) / TOKENS


def main() -> int:
    missed = []
    print(f"{'mixer':24}{'memory':>10}" + "".join(f"{f'ms at {c}':>12}" for c in CONTEXTS) + f"{'ratio':>8}")
    for name, cls in ss.mixers().items():
        if cls.family == "feedforward":
            continue
        torch.manual_seed(0)
        mixer = ss.mixer(name, d_model=D_MODEL).eval()
        states = [state_after(mixer, c) for c in CONTEXTS]
        times = [[milliseconds(mixer, s) for s in states] for _ in range(REPEATS)]
        short, long = (statistics.median(column) for column in zip(*times))
        grows = any(s.grows for s in mixer.slots().values())
        print(f"{name:24}{'grows' if grows else 'constant':>10}{short:12.3f}{long:12.3f}{long / short:8.2f}", flush=True)
        missed += [name] if long / short > BOUND and not grows else []
    print(json.dumps({"bound": BOUND, "threads": torch.get_num_threads(), "missed": missed}))
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
