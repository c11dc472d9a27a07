"""Makes rwkv7.npz: the first layer's time mix, and a channel mix, of the official rwkv package 0.8.32, random weights, float32.

pip install torch==2.13.0 rwkv==0.8.32
python tests/oracles/make_rwkv7.py
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}  # read when rwkv.model is imported

import numpy as np
import torch
from rwkv.model import RWKV_x070_CMix_seq, RWKV_x070_TMix_seq

T, D, H, RANK = 19, 16, 2, 3


def weights():
    """By slipstream's names, which are fla's."""
    shapes = {f"x_{n}": (1, 1, D) for n in "rwkvag"} | {"k_k": (D,), "k_a": (D,), "r_k": (H, D // H)}
    shapes |= {f"{n}_proj.weight": (D, D) for n in "rkvo"} | {"g_norm.weight": (D,), "g_norm.bias": (D,)}
    for n in "wag":
        shapes |= {f"{n}_lora.lora.0.weight": (RANK, D), f"{n}_lora.lora.2.weight": (D, RANK)}
    shapes |= {"w_lora.lora.2.bias": (D,), "a_lora.lora.2.bias": (D,)}
    return {n: 0.5 * torch.randn(s) for n, s in shapes.items()}


def make():
    torch.manual_seed(0)
    w, x = weights(), torch.randn(T, D)
    mixes = [w[f"x_{n}"].flatten() for n in "rwkvag"]
    low, high = ({n: w[f"{n}_lora.lora.{i}.weight"].T for n in "wag"} for i in (0, 2))
    bias = {n: w[f"{n}_lora.lora.2.bias"] for n in "wa"}
    values = [torch.zeros(D), torch.zeros(D, 1), torch.zeros(1, D)]  # the value residual, which layer 0 does not use
    y, _, state, _ = RWKV_x070_TMix_seq(
        0, H, D // H, x.clone(), torch.zeros(D), torch.zeros(T, D), torch.zeros(H, D // H, D // H),
        *mixes, bias["w"], low["w"], high["w"], bias["a"], low["a"], high["a"], *values, low["g"], high["g"],
        w["k_k"], w["k_a"], w["r_k"].flatten(), *(w[f"{n}_proj.weight"].T for n in "rkvo"),
        w["g_norm.weight"], w["g_norm.bias"],
    )  # fmt: skip
    time_mix = {"x": x, "y": y, "state": state, **w}
    return {n: t.numpy() for n, t in {**time_mix, **channel_mix()}.items()}


def channel_mix():
    x, last = torch.randn(T, D), torch.randn(D)
    w = {"x_k": torch.rand(D), "key.weight": 0.5 * torch.randn(20, D), "value.weight": 0.5 * torch.randn(D, 20)}
    y, _ = RWKV_x070_CMix_seq(x, last, w["x_k"], w["key.weight"].T, w["value.weight"].T)
    return {f"channel_mix.{n}": t for n, t in {"x": x, "y": y, "last": last, **w}.items()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("rwkv7.npz"), **make())
