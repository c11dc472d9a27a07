"""Makes rwkv.npz: the time mixes of RWKV-5.2 and RWKV-6 in the official rwkv package 0.8.32, random weights, float32.

pip install torch==2.13.0 rwkv==0.8.32
python tests/oracles/make_rwkv.py
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}  # read when rwkv.model is imported

import numpy as np
import torch
from rwkv.model import RWKV

T, D, H, RANK, LOW = 19, 16, 2, 3, 4
UNUSED = [None] * 4  # scales of quantised weights
LINEAR = ("key", "value", "receptance", "gate", "output")


def common():
    shapes = {f"{n}.weight": (D, D) for n in LINEAR} | {
        "ln_x.weight": (D,),
        "ln_x.bias": (D,),
        "time_faaaa": (H, D // H),
    }
    return {n: 0.5 * torch.randn(s) for n, s in shapes.items()}


def run(method, w, mixes, decay, low_rank=()):
    """Inputs (normalised, as the method does first), outputs without the residual, and the last state."""
    x, last, S = torch.randn(T, D), torch.randn(D), torch.randn(H, D // H, D // H)
    linear = [w[f"{n}.weight"].T.contiguous() for n in LINEAR]
    y, _, state = method(
        None, x, last, S, torch.ones(D), torch.zeros(D), w["ln_x.weight"], w["ln_x.bias"],
        *mixes, *low_rank, decay, w["time_faaaa"][..., None], *linear, *UNUSED * 5,
    )  # fmt: skip
    return {"x": torch.nn.functional.layer_norm(x, (D,)), "y": y - x, "last": last, "S": S, "state": state}


def rwkv5():
    w = common() | {f"time_mix_{n}": torch.rand(1, 1, D) for n in "kvrg"} | {"time_decay": torch.randn(H, D // H)}
    decay = torch.exp(-torch.exp(w["time_decay"]))[..., None]
    return w | run(RWKV.att_seq_v5_2, w, [w[f"time_mix_{n}"].flatten() for n in "kvrg"], decay)


def rwkv6():
    w = common() | {f"time_maa_{n}": torch.rand(1, 1, D) for n in "xwkvrg"}
    shapes = {"time_decay": (1, 1, D), "time_maa_w1": (D, 5 * RANK), "time_maa_w2": (5, RANK, D)}
    shapes |= {"time_decay_w1": (D, LOW), "time_decay_w2": (LOW, D)}
    w |= {n: 0.5 * torch.randn(s) for n, s in shapes.items()}
    low_rank = [w[n] for n in ("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2")]
    mixes = [w[f"time_maa_{n}"].flatten() for n in "xwkvrg"]
    return w | run(RWKV.att_seq_v6_0, w, mixes, w["time_decay"].view(H, D // H, 1), low_rank)


def make():
    torch.manual_seed(0)
    return {f"{version.__name__}.{n}": t.numpy() for version in (rwkv5, rwkv6) for n, t in version().items()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("rwkv.npz"), **make())
