"""Makes rwkv7_checkpoint.npz: a whole RWKV-7 model by the names of its .pth files, tokens, and the logits of the official rwkv
package 0.8.32, random weights, float32.

pip install torch==2.13.0 rwkv==0.8.32
python tests/oracles/make_rwkv7_checkpoint.py
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}  # read when rwkv.model is imported

import numpy as np
import torch
from rwkv.model import RWKV

T, V, D, H, F, N_LAYERS = 23, 31, 16, 2, 40, 3
RANKS = {"w": 3, "a": 4, "v": 2, "g": 5}


def weights():
    """By the names and in the shapes of RWKV-LM's training code, which leaves v0, v1 and v2 out of the first layer."""
    shapes = {"emb.weight": (V, D), "head.weight": (V, D)} | norm("blocks.0.ln0") | norm("ln_out")
    for i in range(N_LAYERS):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block(first=i == 0).items()}
    return {n: 0.5 * torch.randn(s) + (1 if ".ln" in n and "weight" in n else 0) for n, s in shapes.items()}


def norm(name):
    return {f"{name}.weight": (D,), f"{name}.bias": (D,)}


def block(first):
    shapes = norm("ln1") | norm("ln2") | norm("att.ln_x")
    shapes |= {f"att.x_{n}": (1, 1, D) for n in "rwkvag"} | {"att.k_k": (1, 1, D), "att.k_a": (1, 1, D)}
    for n, rank in RANKS.items():
        if n == "v" and first:
            continue
        shapes |= {f"att.{n}1": (D, rank), f"att.{n}2": (rank, D)} | ({} if n == "g" else {f"att.{n}0": (1, 1, D)})
    shapes |= {f"att.{n}.weight": (D, D) for n in ("receptance", "key", "value", "output")}
    return shapes | {
        "att.r_k": (H, D // H), "ffn.x_k": (1, 1, D), "ffn.key.weight": (F, D), "ffn.value.weight": (D, F),
    }  # fmt: skip


def make():
    torch.manual_seed(0)
    made, tokens = weights(), torch.randint(0, V, (T,))
    with tempfile.TemporaryDirectory() as folder:
        torch.save(made, Path(folder) / "model.pth")
        model = RWKV(str(Path(folder) / "model"), "cpu fp32")
        logits, state = model.forward(tokens.tolist(), None, full_output=True)
        after, _ = model.forward([7], state)
    found = {"tokens": tokens, "logits": logits, "after": after}
    return {n: t.numpy() for n, t in {**found, **made}.items()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("rwkv7_checkpoint.npz"), **make())
