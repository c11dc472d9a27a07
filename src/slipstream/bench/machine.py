"""What this machine has and can do: cores, vector instructions, memory, and two physical limits measured in a second each."""

from __future__ import annotations

import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from slipstream.ops.dispatch import BACKENDS

SIMD = ("avx512f", "amx_tile", "avx2", "fma", "asimd", "sve")


def describe(measured: bool = True) -> dict[str, Any]:
    """Facts of this machine; with `measured`, its matmul rate and memory bandwidth too (about two seconds)."""
    flags = _cpu_flags()
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "simd": [s for s in SIMD if s in flags],
        "memory_gib": round(_memory() / 2**30, 1),
        "os": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": {op: [b.name for b in backends] for op, backends in sorted(BACKENDS.items())},
    }
    return facts | ({"matmul_gflops": matmul_rate(), "read_gb_per_s": read_bandwidth()} if measured else {})


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def matmul_rate(size: int = 1536, repeats: int = 5) -> float:
    """GFLOP/s of a large float32 matrix product, all threads; the best of a few."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return round(2 * size**3 / _best(lambda: a @ b, repeats) / 1e9, 1)


def read_bandwidth(megabytes: int = 256, repeats: int = 5) -> float:
    """GB/s of summing a large float32 array, all threads; the best of a few."""
    x = torch.ones(megabytes * 2**18)
    return round(x.nbytes / _best(lambda: x.sum(), repeats) / 1e9, 1)


def two_threads_help() -> dict[str, float]:
    """Milliseconds of a small training-like step with one thread and with all: which to use for tiny models."""
    threads, x, w = torch.get_num_threads(), torch.randn(256, 128), torch.randn(128, 128)
    found = {}
    for n in (1, usable_cores()):
        torch.set_num_threads(n)
        found[f"{n}"] = round(1e3 * statistics.median(_times(lambda: torch.tanh(x @ w) @ w, 200)), 4)
    torch.set_num_threads(threads)
    return found


def _times(f: Any, repeats: int) -> list[float]:
    f()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return times


def _best(f: Any, repeats: int) -> float:
    return min(_times(f, repeats))


def _cpu_name() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
