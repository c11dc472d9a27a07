"""The machine a measurement was made on: what it is, how fast its memory and its matrix products are, and what runs each op."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from slipstream import ops
from slipstream.core.packages import import_all
from slipstream.core.quantities import bytes_in_words
from slipstream.models.language_model import language_model
from slipstream.models.threads import seconds_by_threads, writing
from slipstream.ops import dispatch

SIMD = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_bf16",
    "amx_int8",
    "neon",
    "asimd",
    "sve",
)
READ_BYTES = 256 * 2**20  # far more than any cache
MATMUL = 1536  # rows and columns
ENOUGH = 0.5  # seconds of repetitions


def describe(measured: bool = True) -> dict[str, Any]:
    """Facts of this machine, in the order a person would ask for them. measured: also memory bandwidth and matmul rate, which
    take about two seconds, and the backend of each op."""
    facts = {
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 1,
        "simd": simd(),
        "memory": bytes_in_words(memory_bytes()),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "load": round(os.getloadavg()[0], 2),
    }
    return facts | (rates() | {"threads_measured": threads_measured(), "backends": backends()} if measured else {})


def threads_measured() -> list[dict[str, Any]]:
    """For a small and a larger model: seconds a token by number of threads, and the number that would be chosen."""
    rows = []
    for size in ("1M", "30M"):
        found = seconds_by_threads(writing(language_model("attention", params=size, vocab_size=256)))
        rows.append({"parameters": size, "seconds": found, "chosen": min(found, key=found.__getitem__)})
    return rows


def rates() -> dict[str, float]:
    """Reading memory, and float32 matrix products, with the threads torch has."""
    return {"read_gb_per_second": round(read_rate() / 1e9, 1), "matmul_gflops": round(matmul_rate() / 1e9, 1)}


def read_rate(n_bytes: int = READ_BYTES) -> float:
    """Bytes a second of summing a tensor that fits no cache."""
    x = torch.ones(n_bytes // 4)
    return n_bytes / _best(x.sum)


def matmul_rate(n: int = MATMUL) -> float:
    """Floating-point operations a second of one large float32 product."""
    a, b = torch.ones(n, n), torch.ones(n, n)
    return 2.0 * n**3 / _best(lambda: a @ b)


def _best(run: Callable[[], object]) -> float:
    """The shortest of some repetitions: what the machine can do when nothing disturbs it."""
    run()
    taken: list[float] = []
    start = time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - start < ENOUGH:
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return min(taken)


def backends() -> list[dict[str, str]]:
    """For each op: what runs it here, reading and training, and why."""
    import_all(ops)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [_backend(op, device) for op in sorted(dispatch.OPS)]


def _backend(op: str, device: str) -> dict[str, str]:
    offered = [b.name for b in dispatch.offered(op)]
    reading, training = (dispatch.chosen(op, dispatch.Call(device, torch.float32, grad)) for grad in (False, True))
    if not offered:
        why = "no other form of it is there"
    elif reading == training == "torch":
        why = f"{', '.join(offered)} does not take float32 on {device}"
    else:
        why = f"{', '.join(offered)} is there for {device} in float32" + (
            "" if reading == training else ", without gradients only"
        )
    return {"op": op, "reading": reading, "training": training, "why": why}


def overloaded() -> str:
    """Why timings made now would mislead, or ''."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return (
        f"load average {load:.1f} on {cores} cores: other work is running, timings will be too long"
        if load > cores
        else ""
    )


def cpu_name() -> str:
    named = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def simd() -> str:
    """The instruction sets that matter here, and the width torch's own code was chosen for."""
    flags = next(
        (set(line.split()) for line in _lines("/proc/cpuinfo") if line.lower().startswith(("flags", "features"))), set()
    )
    has = [name for name in SIMD if name in flags]
    return " ".join(has) + f" (torch uses {torch.backends.cpu.get_cpu_capability()})"


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _lines(path: str) -> list[str]:
    """A file of the system's, or nothing where there is none (not on Linux)."""
    return Path(path).read_text().splitlines() if Path(path).exists() else []
