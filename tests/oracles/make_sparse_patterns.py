"""Makes sparse_patterns.npz: three layers in float64 numpy, each as its paper describes it, without this package.

sparse_transformer: sets of keys token by token (Child et al. 2019, sec. 4.3). longnet: queries, keys and values of every
segment cut out with a stride, a softmax for each, branches mixed by their denominators (Ding et al. 2023, sec. 2.2 and
2.3). transformer_xl: one segment after the other, hidden states of the last one kept (Dai et al. 2019, sec. 3).

    python tests/oracles/make_sparse_patterns.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

B, T, D, H = 2, 41, 8, 2
K = D // H
STRIDE, SUMMARY = 6, 2
SEGMENTS, RATES = (4, 12, 24), (1, 2, 4)
SEGMENT = 7
draw = np.random.default_rng(0)


def weight(*shape):
    return 0.6 * draw.standard_normal(shape)


def by_heads(x, w):
    return (x @ w.T).reshape(*x.shape[:-1], H, K)


def turned(x):
    """Rotary positions, as complex numbers."""
    half = K // 2
    angle = np.arange(T)[:, None] * 10000.0 ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
    return np.concatenate([z.real, z.imag], -1)


def softmax_read(q, k, v):
    """One query (K), keys and values (S K): what it reads, and its denominator."""
    e = np.exp(k @ q / np.sqrt(K))
    return e @ v / e.sum(), e.sum()


def projected():
    x = draw.standard_normal((B, T, D))
    w = {f"qkv.{n}_proj.weight": weight(D, D) for n in "qkv"} | {"o_proj.weight": weight(D, D)}
    q, k, v = (by_heads(x, w[f"qkv.{n}_proj.weight"]) for n in "qkv")
    return x, w, turned(q), turned(k), v


def strided(i):
    near = set(range(max(0, i - STRIDE), i + 1))
    return near | {j for j in range(i + 1) if (i - j) % STRIDE == 0}


def fixed(i):
    own = {j for j in range(i + 1) if j // STRIDE == i // STRIDE}
    return own | {j for j in range(i + 1) if j % STRIDE in range(STRIDE - SUMMARY, STRIDE)}


def sparse_transformer(keys_of):
    x, w, q, k, v = projected()
    o = np.zeros((B, T, H, K))
    for b, t, h in np.ndindex(B, T, H):
        seen = sorted(keys_of(t))
        o[b, t, h] = softmax_read(q[b, t, h], k[b, seen, h], v[b, seen, h])[0]
    return {"x": x, **w, "y": o.reshape(B, T, D) @ w["o_proj.weight"].T}


def longnet():
    x, w, q, k, v = projected()
    o, s = np.zeros((len(RATES), B, T, H, K)), np.zeros((len(RATES), B, T, H))
    for i, (size, rate) in enumerate(zip(SEGMENTS, RATES)):
        for b, h in np.ndindex(B, H):
            for begin in range(0, T, size):
                rows = np.arange(begin + h % rate, min(T, begin + size), rate)
                for n, t in enumerate(rows):
                    o[i, b, t, h], s[i, b, t, h] = softmax_read(
                        q[b, t, h], k[b, rows[: n + 1], h], v[b, rows[: n + 1], h]
                    )
    share = s / s.sum(0)
    mixed = (share[..., None] * o).sum(0)
    return {"x": x, **w, "y": mixed.reshape(B, T, D) @ w["o_proj.weight"].T}


def transformer_xl():
    x = draw.standard_normal((B, T, D))
    w = {f"{n}_proj.weight": weight(D, D) for n in "qkvo"} | {
        "r_proj": weight(H, K, D),
        "u": weight(H, K),
        "b": weight(H, K),
    }
    W_r = w["r_proj"].reshape(D, D)
    memory, outputs = np.zeros((B, 0, D)), []
    for begin in range(0, T, SEGMENT):
        hidden = x[:, begin : begin + SEGMENT]
        both = np.concatenate([memory, hidden], 1)
        q = by_heads(hidden, w["q_proj.weight"])
        k, v = by_heads(both, w["k_proj.weight"]), by_heads(both, w["v_proj.weight"])
        o = np.zeros(q.shape)
        for b, i, h in np.ndindex(*q.shape[:3]):
            last = memory.shape[1] + i
            logits = np.zeros(last + 1)
            for j in range(last + 1):
                frequency = 1 / 10000 ** (np.arange(0, D, 2) / D)
                R = np.concatenate([np.sin((last - j) * frequency), np.cos((last - j) * frequency)])
                r = (W_r @ R).reshape(H, K)[h]
                content = q[b, i, h] @ k[b, j, h] + w["u"][h] @ k[b, j, h]
                logits[j] = content + q[b, i, h] @ r + w["b"][h] @ r
            e = np.exp(logits / np.sqrt(K))
            o[b, i, h] = e @ v[b, : last + 1, h] / e.sum()
        outputs.append(o.reshape(B, -1, D) @ w["o_proj.weight"].T)
        memory = hidden
    return {"x": x, **w, "y": np.concatenate(outputs, 1)}


if __name__ == "__main__":
    made = {
        "sparse_transformer strided": sparse_transformer(strided),
        "sparse_transformer fixed": sparse_transformer(fixed),
        "longnet": longnet(),
        "transformer_xl": transformer_xl(),
    }
    arrays = {f"{name}/{key}": array for name, found in made.items() for key, array in found.items()}
    np.savez_compressed(Path(__file__).with_name("sparse_patterns.npz"), **arrays)
