"""Makes attention_mixtures.npz: MoH, SwitchHead and MoSA in float64 numpy, each with random weights.

Written from the papers and, where these leave a choice, from what the authors' code does (SkyworkAI/MoH, MoH-DiT with a causal
mask; RobertCsordas/switchhead, SwitchHeadRope; piotrpiekos/MoSA, MoSA with dense heads). Whole T x T matrices, all heads and
experts of every token, a zero weight for those not chosen.

    pip install numpy
    python tests/oracles/make_attention_mixtures.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

B, T, D = 2, 21, 12
draw = np.random.default_rng(0)


def weights(**shapes):
    return {name.replace("__", "."): 0.6 * draw.standard_normal(shape) for name, shape in shapes.items()}


def softmax(a):
    e = np.exp(a - a.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def largest(a, k):
    """One where an entry is among the k largest along the last axis, else zero."""
    return (a >= np.sort(a, -1)[..., -k, None]).astype(float)


def turned(t, n, places):
    """The first n channels of t (... T K) as complex numbers, turned by their places (... T)."""
    angle = places[..., None] * 10000.0 ** (-np.arange(n // 2) / (n // 2))
    z = (t[..., : n // 2] + 1j * t[..., n // 2 : n]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag, t[..., n:]], -1)


def read(q, k, v, seen):
    """Attention (B H T K) where seen (B H T T) is true."""
    logits = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    return softmax(np.where(seen, logits, -1e30)) @ v


def by_head(t, n):
    return t.reshape(B, T, n, -1).swapaxes(1, 2)


def mixture_of_heads(x, n_shared=2, H=6, G=3, top_k=3):
    kv = (G * D // H, D)
    w = weights(qkv__q_proj__weight=(D, D), qkv__k_proj__weight=kv, qkv__v_proj__weight=kv, o_proj__weight=(D, D))
    w |= weights(gates__routed__weight=(H - n_shared, D))
    p = softmax(x @ w["gates.routed.weight"].T)
    p = p * largest(p, top_k)
    g = top_k * p / p.sum(-1, keepdims=True)
    if n_shared:
        w |= weights(gates__shared__weight=(n_shared, D), gates__balance__weight=(2, D))
        a = 2 * softmax(x @ w["gates.balance.weight"].T)
        shared = n_shared * softmax(x @ w["gates.shared.weight"].T)
        g = np.concatenate([a[..., :1] * shared, a[..., 1:] * g], -1)
    q = by_head(x @ w["qkv.q_proj.weight"].T, H)
    k, v = (np.repeat(by_head(x @ w[f"qkv.{n}_proj.weight"].T, G), H // G, 1) for n in "kv")
    o = read(q, k, v, np.tri(T, dtype=bool)).swapaxes(1, 2) * g[..., None]
    return w, o.reshape(B, T, D) @ w["o_proj.weight"].T


def switchhead(x, H=2, E=3, K=4, top_k=2):
    w = weights(q_proj__weight=(H * K, D), k_proj__weight=(H * K, D), v_experts=(H * E, K, D), o_experts=(H * E, D, K))
    w |= weights(v_router__weight=(H * E, D), o_router__weight=(H * E, D))
    gates = (sigmoid(x @ w[f"{n}_router.weight"].T).reshape(B, T, H, E) for n in "vo")
    v_gates, o_gates = (g * largest(g, top_k) for g in gates)
    q, k = (turned(by_head(x @ w[f"{n}_proj.weight"].T, H), K // 2, np.arange(T)) for n in "qk")
    v_all = np.einsum("btd,hekd->bthek", x, w["v_experts"].reshape(H, E, K, D))
    v = np.einsum("bthe,bthek->bhtk", v_gates, v_all)
    o = read(q, k, v, np.tri(T, dtype=bool))
    return w, np.einsum("bthe,hedk,bhtk->btd", o_gates, w["o_experts"].reshape(H, E, D, K), o)


def mosa(x, n_dense=1, H=2, K=4, sparsity=4, first=False, causal=True):
    """The choice of a head as a mask over all tokens."""
    w = weights(router__weight=(H, D), qkv_heads=(H, 3 * K, D), o_heads=(H, D, K))
    w |= weights(qkv_proj__weight=(3 * n_dense * K, D), o_proj__weight=(D, n_dense * K)) if n_dense else {}
    r = sigmoid(x @ w["router.weight"].T).swapaxes(1, 2)
    wanted = np.where(np.arange(T) == 0, 2.0, r) if first else r
    kept = largest(wanted, max(T // sparsity, 2)) > 0
    order = np.tri(T, dtype=bool) if causal else np.ones((T, T), dtype=bool)
    q, k, v = np.split(np.einsum("btd,hod->bhto", x, w["qkv_heads"]), 3, -1)
    q, k = (turned(t, K // 2, np.arange(T)) for t in (q, k))
    o = read(q, k, v, kept[:, :, None, :] & order) * (r * kept)[..., None]
    y = np.einsum("bhtk,hdk->btd", o, w["o_heads"])
    if n_dense:
        line = x @ w["qkv_proj.weight"].T
        q, k, v = (by_head(t, n_dense) for t in np.split(line, 3, -1))
        q, k = (turned(t, K // 2, np.arange(T)) for t in (q, k))
        y = y + read(q, k, v, order).swapaxes(1, 2).reshape(B, T, -1) @ w["o_proj.weight"].T
    return w, y


CASES = {
    "mixture_of_heads": lambda x: mixture_of_heads(x),
    "mixture_of_heads routed": lambda x: mixture_of_heads(x, n_shared=0, top_k=2),
    "switchhead": lambda x: switchhead(x),
    "mosa": lambda x: mosa(x),
    "mosa first": lambda x: mosa(x, n_dense=0, H=3, sparsity=5, first=True),
    "mosa encoder": lambda x: mosa(x, n_dense=2, H=1, sparsity=2, causal=False),
}

if __name__ == "__main__":
    arrays = {}
    for name, make in CASES.items():
        x = draw.standard_normal((B, T, D))
        w, y = make(x)
        arrays |= {f"{name}/{n}": a for n, a in {**w, "x": x, "y": y}.items()}
    np.savez_compressed(Path(__file__).with_name("attention_mixtures.npz"), **arrays)
