"""Does a longer sequence cost in proportion? Forward time and peak memory at 8192 tokens over 1024, one layer, batch 1.

    python bench/linear_in_length.py                every mixer but those that say O(T^2); bound: 9 times
    python bench/linear_in_length.py mamba2 kda     these

Times are medians of interleaved repetitions; memory is the peak of a fresh process above that of the imports and weights.
Exits 1 when a bound is missed.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time

import torch

import slipstream as ss

SHORT, LONG, D_MODEL, BOUND, REPEATS = 1024, 8192, 256, 9.0, 7


def layer(name: str) -> ss.Mixer:
    torch.manual_seed(0)
    return ss.mixer(name, d_model=D_MODEL).eval()


@torch.no_grad()
def seconds(mixer: ss.Mixer, x: torch.Tensor) -> float:
    start = time.perf_counter()
    mixer(x)
    return time.perf_counter() - start


def time_ratio(mixer: ss.Mixer) -> tuple[float, float, float]:
    """Ratio of medians, and both medians; short and long runs alternate."""
    xs = [torch.randn(1, n, D_MODEL) for n in (SHORT, LONG)]
    for x in xs:
        seconds(mixer, x)
    times = [[seconds(mixer, x) for x in xs] for _ in range(REPEATS)]
    short, long = (statistics.median(column) for column in zip(*times))
    return long / short, short, long


def peak_above_start(name: str, tokens: int) -> int:
    """Bytes that a forward adds to the peak of a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--peak", name, str(tokens)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def report_peak(name: str, tokens: int) -> None:
    mixer, x = layer(name), torch.randn(1, tokens, D_MODEL)
    with torch.no_grad():
        mixer(x[:, :64])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        mixer(x)
    print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def main(names: list[str]) -> int:
    missed = []
    print(f"{'mixer':24}{'ms at 1024':>12}{'ms at 8192':>12}{'ratio':>8}{'MiB at 1024':>13}{'MiB at 8192':>13}{'ratio':>8}")
    for name in names:
        ratio, short, long = time_ratio(layer(name))
        small, large = (peak_above_start(name, n) / 2**20 for n in (SHORT, LONG))
        memory = large / max(small, 1.0)  # under a MiB the process's own granularity is all there is
        print(f"{name:24}{1e3 * short:12.1f}{1e3 * long:12.1f}{ratio:8.2f}{small:13.1f}{large:13.1f}{memory:8.2f}", flush=True)
        missed += [name] if ratio > BOUND or memory > BOUND else []
    print(json.dumps({"bound": BOUND, "threads": torch.get_num_threads(), "missed": missed}))
    return bool(missed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        report_peak(sys.argv[2], int(sys.argv[3]))
    else:
        every = [n for n, c in ss.mixers().items() if c.train_order == "T" and c.family != "feedforward"]
        sys.exit(main(sys.argv[1:] or every))
