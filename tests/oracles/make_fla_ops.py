"""Makes fla_ops.npz: the plain PyTorch operators of flash-linear-attention 0.6.0, which compute in float32.

pip install torch==2.13.0 triton==3.9.0 fla-core==0.6.0 flash-linear-attention==0.6.0
TRITON_INTERPRET=1 python tests/oracles/make_fla_ops.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

B, T, H, K, V = 1, 40, 2, 8, 10


def inputs():
    torch.manual_seed(0)
    k = F.normalize(torch.randn(B, T, H, K), dim=-1)
    a = F.normalize(torch.randn(B, T, H, K), dim=-1)
    return {
        "q": torch.randn(B, T, H, K), "k": k, "v": torch.randn(B, T, H, V), "beta": torch.rand(B, T, H),
        "per_head": F.logsigmoid(torch.randn(B, T, H)), "per_channel": F.logsigmoid(torch.randn(B, T, H, K)),
        "read": -a, "write": a * torch.rand(B, T, H, K),
    }  # fmt: skip


def heads_first(f, *tensors):
    """An operator laid out B H T D: its output laid out B T H D, its state as it is."""
    o, state = f(*(x.transpose(1, 2).contiguous() for x in tensors))
    return o.transpose(1, 2), state


def make():
    from fla.ops.delta_rule.naive import delta_rule_recurrence
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.kda.naive import naive_recurrent_kda
    from fla.ops.retention.naive import naive_retention
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    x = inputs()
    q, k, v, beta, g, gk = (x[n] for n in ("q", "k", "v", "beta", "per_head", "per_channel"))
    keep = {"output_final_state": True}
    retained = naive_retention(*(t.transpose(1, 2).contiguous() for t in (q, k, v))).transpose(1, 2)
    results = {
        "retention": (retained, torch.zeros(0)),
        "gla": naive_recurrent_gla(q, k, v, gk, **keep),
        "simple_gla": naive_recurrent_simple_gla(q, k, v, g),
        "delta": heads_first(delta_rule_recurrence, q, k, v, beta),
        "gated_delta": naive_recurrent_gated_delta_rule(q, k, v, beta, g, **keep),
        "kda": naive_recurrent_kda(q, k, v, gk, beta, **keep),
        "dplr": heads_first(dplr_recurrence, q, k, v, x["read"], x["write"], gk),
    }
    outputs = {f"{op}/{n}": t for op, pair in results.items() for n, t in zip(("o", "S"), pair)}
    return {n: t.numpy() for n, t in (x | outputs).items()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("fla_ops.npz"), **make())
