"""A made-up comparison of eight architectures with the shapes that real ones have: decays, plateaus, noise and growth."""

from __future__ import annotations

import math
import random
from typing import Any

# arch: family, growth, bits per byte, train tokens/s, us a token of prefill, its growth a token,
# ms a token of decoding, its growth a 1k tokens, KiB of state (0: it grows)
CURVES = {
    "gated_deltanet": ("delta", "constant", 2.118, 9100, 52, 0.0, 0.92, 0.0, 132.0),
    "mamba2": ("ssm", "constant", 2.171, 9800, 44, 0.0, 0.81, 0.0, 148.0),
    "rwkv7": ("delta", "constant", 2.139, 6900, 71, 0.0, 1.21, 0.0, 129.0),
    "attention": ("attention", "grows", 2.205, 11800, 31, 0.009, 0.66, 0.21, 0.0),
    "sliding_window": ("attention", "window", 2.228, 12100, 33, 0.0, 0.70, 0.0, 768.0),
    "retnet": ("linear", "constant", 2.262, 12700, 36, 0.0, 0.63, 0.0, 128.0),
    "lstm": ("rnn", "constant", 2.347, 7400, 64, 0.0, 0.41, 0.0, 8.0),
    "tcn": ("conv", "window", 2.391, 15300, 26, 0.0, 0.52, 0.0, 46.0),
}
REACH = {
    "attention": 1e9,
    "gated_deltanet": 2e5,
    "rwkv7": 6e4,
    "mamba2": 9e3,
    "retnet": 2500,
    "sliding_window": 700,
    "lstm": 300,
    "tcn": 180,
}
SOLVED = {
    "attention": 24_000,
    "gated_deltanet": 26_000,
    "rwkv7": 31_000,
    "mamba2": 44_000,
    "retnet": 52_000,
    "sliding_window": 29_000,
}


def comparison(seeds: int = 1) -> list[dict[str, Any]]:
    """All records of a finished comparison."""
    setup = {
        "kind": "setup",
        "data": "texts/middlemarch.txt",
        "data_bytes": 1_793_460,
        "archs": list(CURVES),
        "params": 500_000,
        "tokens": 1_000_000,
        "context": 512,
        "seeds": list(range(seeds)),
        "equal": "tokens",
        "baseline_bpb": {"unigram": 4.47, "gzip": 2.94},
        "machine": {
            "cpu": "AMD EPYC 7B13",
            "cores": 2,
            "memory": "23.5 GiB",
            "system": "Linux 6.1",
            "python": "3.11.7",
            "torch": "2.13.0+cpu",
        },
        "command": "slipstream compare texts/middlemarch.txt --params 500k --tokens 1M --context 512 --budget 5m",
        "version": "0.1.0",
        "finished": True,
        "seconds": 290,
    }
    return [setup, *(record for arch in CURVES for record in of(arch, seeds))]


def of(arch: str, seeds: int = 1) -> list[dict[str, Any]]:
    """The records of one architecture."""
    return [
        _model(arch),
        *(_quality(arch, s) for s in range(seeds)),
        *(_recall(arch, s) for s in range(seeds)),
        _speed(arch),
        _state(arch),
    ]


def _model(arch: str) -> dict[str, Any]:
    family, growth, *_ = CURVES[arch]
    orders = ("T^2", "T") if growth == "grows" else ("T", "1")
    return {
        "kind": "model",
        "arch": arch,
        "pattern": arch,
        "params": 499_712,
        "n_layers": 4,
        "d_model": 96,
        "d_ff": 256,
        "family": family,
        "train_order": orders[0],
        "decode_order": orders[1],
        "state_growth": growth,
        "use_when": "a sentence that says for what it is good",
    }


def _quality(arch: str, seed: int) -> dict[str, Any]:
    chance = random.Random(f"{arch}{seed}")
    final, speed = CURVES[arch][2] + 0.006 * chance.gauss(0, 1) * bool(seed), CURVES[arch][3]
    tokens = [25_000 * 2**k for k in range(5)] + [500_000, 600_000, 700_000, 800_000, 900_000, 1_000_000]
    curve = [
        [t, t / speed, final + 1.9 * (math.exp(-t / 9e4) + 0.09 * (1 - t / 1e6)) + 0.004 * chance.gauss(0, 1)]
        for t in tokens
    ]
    return {
        "kind": "quality",
        "arch": arch,
        "seed": seed,
        "val_bpb": final,
        "val_stderr": 0.008,
        "tokens": 1_000_000,
        "seconds": 1e6 / speed,
        "tokens_per_second": float(speed),
        "curve": curve,
        "diverged": False,
    }


def _recall(arch: str, seed: int) -> dict[str, Any]:
    distance = [
        {"distance": d, **_share(0.985 * math.exp(-d / REACH[arch]) + 0.004)}
        for d in (64, 128, 256, 512, 1024, 2048, 4096)
    ]
    holds = 4 * math.log10(REACH[arch])
    load = [
        {"pairs": n, **_share(1 / (1 + math.exp((math.log2(n) - holds / 3.5) * 1.7)))} for n in (2, 4, 8, 16, 32, 64)
    ]
    solved = SOLVED.get(arch)
    return {
        "kind": "recall",
        "arch": arch,
        "seed": seed,
        "examples_to_solve": solved,
        "examples": solved or 60_000,
        "seconds": 31.0,
        "accuracy": 0.99 if solved else 0.14,
        "curve": [[12_800, 0.03], [25_600, 0.4]],
        "distance": distance,
        "load": load,
        "state_bytes": 16_384,
    }


def _share(p: float) -> dict[str, float]:
    n, z = 400, 1.96
    p = round(p * n) / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return {
        "exact": p,
        "near": (1 - p) * 0.3,
        "absent": (1 - p) * 0.7,
        "low": max(0.0, low),
        "high": min(1.0, high),
        "n": n,
    }


def _speed(arch: str) -> dict[str, Any]:
    *_, rate, us, bend, ms, growth, _ = CURVES[arch]
    prefill = [[n, n * (us + bend * n) * 1e-6, n * us * 1e-6 * 0.02] for n in (512, 1024, 2048, 4096, 8192)]
    return {
        "kind": "speed",
        "arch": arch,
        "prefill": prefill,
        "decode": [[n, ms + growth * n / 1024, 0.02] for n in (512, 2048, 8192)],
        "train": float(rate),
    }


def _state(arch: str) -> dict[str, Any]:
    kib = CURVES[arch][8]
    return {
        "kind": "state",
        "arch": arch,
        "bytes": [[n, int(kib * 1024) or 3072 * n] for n in (512, 1024, 2048, 4096, 8192, 16384, 32768)],
    }
