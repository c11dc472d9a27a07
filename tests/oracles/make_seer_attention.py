"""Makes seer_attention.npz: SeerAttention-R in numpy and float64, from arXiv:2506.08889, eq. 1, and from what the authors' code
(microsoft/SeerAttention, decode_sparse) adds to it: pools in the order max, min, mean; positions of a block are those of its
first token; of the queries' gate the weight (G H/G K K); the token's own block always read, whole blocks before it by budget
(the own one counted) or by threshold. Token by token, every one as if it were decoded.

    python tests/oracles/make_seer_attention.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

B, T, D, H, G, L = 2, 29, 24, 4, 2, 5
K = D // H
SETTINGS = {"budget": (3, 0.0), "threshold": (T, 0.22), "both": (3, 0.25)}


def turned(x, position):
    """One vector, by rotary positions in the half-split layout."""
    angle = position * 10000.0 ** (-2 * np.arange(K // 2) / K)
    a, b = x[: K // 2], x[K // 2 :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def blocks_read(q, k, w, t, g, top_k, threshold):
    """Numbers of the blocks that key head g reads at t, of one row."""
    asked = sum(q[t, g * (H // G) + r] @ w["gate_q"][g, r] for r in range(H // G))
    scores = []
    for i in range(t // L):
        block = k[i * L : i * L + L, g]
        pooled = np.concatenate([block.max(0), block.min(0), block.mean(0)])
        scores.append(turned(asked, t) @ turned(pooled @ w["gate_k"][g], i * L) / K**0.5)
    if not scores:
        return [t // L]
    share = softmax(np.array(scores))
    best = np.argsort(-share, kind="stable")[: top_k - 1]
    return [*best[share[best] >= threshold], t // L]


def layer(x, w, top_k, threshold):
    y = np.zeros_like(x)
    read = 0
    for b in range(B):
        q, k, v = ((x[b] @ w[n].T).reshape(T, -1, K) for n in "qkv")
        for t in range(T):
            heads = []
            for h in range(H):
                g = h // (H // G)
                chosen = blocks_read(q, k, w, t, g, top_k, threshold)
                read += len(chosen)
                seen = [s for s in range(t + 1) if s // L in chosen]
                logits = np.array([turned(q[t, h], t) @ turned(k[s, g], s) for s in seen]) / K**0.5
                heads.append(softmax(logits) @ v[seen, g])
            y[b, t] = w["o"] @ np.concatenate(heads)
    print(f"top_k {top_k}, threshold {threshold}: {read / (B * T * H):.2f} blocks a token")
    return y


def main():
    draw = np.random.default_rng(0)
    shapes = {
        "q": (D, D),
        "k": (G * K, D),
        "v": (G * K, D),
        "o": (D, D),
        "gate_q": (G, H // G, K, K),
        "gate_k": (G, 3 * K, K),
    }
    w = {n: 0.3 * draw.standard_normal(s) for n, s in shapes.items()}
    x = draw.standard_normal((B, T, D))
    found = {f"y/{name}": layer(x, w, *how) for name, how in SETTINGS.items()}
    np.savez_compressed(Path(__file__).with_name("seer_attention.npz"), x=x, **w, **found)


if __name__ == "__main__":
    main()
