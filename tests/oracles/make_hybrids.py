"""Makes hybrids.npz: Hymba, LoLCATs and Liger attention, written from papers and authors' code in numpy, float64.

hymba     the learned tokens stand before the text: their keys and values by their own projections, and Mamba run over them from
          zeros; then the text, token by token. What they leave behind is stored as the mixer's meta tensors.
lolcats   weights of all pairs in a T x T matrix: softmax's exponentials in the window, products of features before it.
liger     two T x T matrices: the window's softmax, and softmax features under products of all gates between.
split     a T x T matrix a head: softmax of the window, or products under all gates between.

    python tests/oracles/make_hybrids.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

B, T, D, H, G, W = 2, 13, 8, 4, 2, 4
K = D // H
M, N, R, TAPS, EXPAND = 3, 3, 1, 3, 2  # meta tokens, states, rank of dt, taps, width of values


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def turned(x, positions, base=10000.0):
    """x (T H K): pairs (i, i + K/2)."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * base ** -(np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def projections(rng, **widths):
    return {f"{name}.weight": rng.normal(size=(out, D)) * 0.5 for name, out in widths.items()}


def by_heads(x, weight, heads):
    return (x @ weight.T).reshape(len(x), heads, -1)


def grouped(w, x, positions):
    """q (T H K), k and v repeated for the heads that share them; q and k as they are, and turned."""
    q, k, v = (by_heads(x, w[f"qkv.{n}_proj.weight"], heads) for n, heads in (("q", H), ("k", G), ("v", G)))
    k, v = (np.repeat(t, H // G, 1) for t in (k, v))
    return q, k, v, turned(q, positions), turned(k, positions)


def pairs(q, k):
    """q . k of all pairs: (H T S)."""
    return np.einsum("thk,shk->hts", q, k)


def lolcats(rng):
    w = projections(rng, **{"qkv.q_proj": D, "qkv.k_proj": G * K, "qkv.v_proj": G * K, "o_proj": D})
    F = 3
    w |= {f"feature_map_{n}": rng.normal(size=(H, F, K)) for n in "qk"} | {"window_factor": rng.normal(size=H)}
    ys, apart = [], np.arange(T)[:, None] - np.arange(T)
    x = rng.normal(size=(B, T, D))
    for row in x:
        _, _, v, q, k = grouped(w, row, np.arange(T))
        mapped = {n: np.einsum("thk,hfk->thf", t, w[f"feature_map_{n}"]) for n, t in (("q", q), ("k", k))}
        phi = {n: np.concatenate([softmax(t), softmax(-t)], -1) for n, t in mapped.items()}
        near, far = (apart >= 0) & (apart < W), apart >= W
        logits = np.where(near, pairs(q, k) / np.sqrt(K), -np.inf)
        exact = sigmoid(w["window_factor"])[:, None, None] * np.exp(logits - logits.max(-1, keepdims=True))
        weights = exact + np.where(far, pairs(phi["q"], phi["k"]), 0)
        o = np.einsum("hts,shk->thk", weights / weights.sum(-1, keepdims=True), v)
        ys.append(o.reshape(T, D) @ w["o_proj.weight"].T)
    return w, x, np.stack(ys)


def liger(rng):
    w = projections(rng, **{"qkv.q_proj": D, "qkv.k_proj": G * K, "qkv.v_proj": G * K, "o_proj": D})
    ys, apart = [], np.arange(T)[:, None] - np.arange(T)
    x = rng.normal(size=(B, T, D))
    for row in x:
        plain_q, plain_k, v, q, k = grouped(w, row, np.arange(T))
        near = np.where((apart >= 0) & (apart < W), pairs(q, k) / np.sqrt(K), -np.inf)
        gate = sigmoid(plain_k) ** (1 / 16)  # T H K
        far = np.zeros((H, T, T))
        for t in range(T):
            for s in range(t + 1):
                kept = np.prod(gate[s + 1 : t + 1], axis=0)
                far[:, t, s] = (softmax(plain_q)[t] * kept * softmax(plain_k)[s]).sum(-1)
        o = np.einsum("hts,shk->thk", (softmax(near) + far) / 2, v)
        ys.append(o.reshape(T, D) @ w["o_proj.weight"].T)
    return w, x, np.stack(ys)


def head_split(rng):
    """Two softmax heads on one key head, two linear heads on the other; norms and W_o on both."""
    w = projections(rng, **{"qkv.q_proj": D, "qkv.k_proj": G * K, "qkv.v_proj": G * K, "a_proj": 2, "o_proj": D})
    w |= {"A_log": rng.normal(size=2), "dt_bias": rng.normal(size=2), "o_norm.weight": 1 + 0.3 * rng.normal(size=K)}
    ys, apart = [], np.arange(T)[:, None] - np.arange(T)
    x = rng.normal(size=(B, T, D))
    for row in x:
        _, _, v, q, k = grouped(w, row, np.arange(T))
        logits = pairs(q, k) / np.sqrt(K)
        exact = softmax(np.where((apart >= 0) & (apart < W), logits[:2], -np.inf))
        gate = np.exp(-np.exp(w["A_log"]) * np.log1p(np.exp(row @ w["a_proj.weight"].T + w["dt_bias"])))
        kept = np.array([[np.prod(gate[s + 1 : t + 1], axis=0) * (s <= t) for s in range(T)] for t in range(T)])
        o = np.einsum("hts,shk->thk", np.concatenate([exact, kept.transpose(2, 0, 1) * logits[2:]]), v)
        ys.append(rms(o, w["o_norm.weight"]).reshape(T, D) @ w["o_proj.weight"].T)
    return w, x, np.stack(ys)


def mamba_token(w, tail, x, h):
    """One token of Mamba from its last inputs and its state: output before the gate, new last inputs and state."""
    tail = np.concatenate([tail, x[None]])
    u = silu((tail.T * w["conv1d.weight"][:, 0]).sum(-1) + w["conv1d.bias"])
    r, b, c = np.split(w["x_proj.weight"] @ u, [R, R + N])
    r, b, c = (rms(t, w[f"{n}_layernorm.weight"]) for n, t in (("dt", r), ("b", b), ("c", c)))
    dt = np.log1p(np.exp(w["dt_proj.weight"] @ r + w["dt_proj.bias"]))
    h = np.exp(dt[:, None] * -np.exp(w["A_log"])) * h + (dt * u)[:, None] * b
    return h @ c + w["D"] * u, tail[1:], h


def hymba(rng):
    inner, sizes = EXPAND * D, [D, G * K, EXPAND * G * K, EXPAND * D, EXPAND * D]
    w = projections(rng, in_proj=sum(sizes)) | {
        "conv1d.weight": rng.normal(size=(inner, 1, TAPS)),
        "conv1d.bias": rng.normal(size=inner),
        "x_proj.weight": rng.normal(size=(R + 2 * N, inner)) * 0.3,
        "dt_proj.weight": rng.normal(size=(inner, R)),
        "dt_proj.bias": rng.normal(size=inner),
        "A_log": rng.normal(size=(inner, N)) * 0.3,
        "D": rng.normal(size=inner),
        "out_proj.weight": rng.normal(size=(D, inner)) * 0.5,
    }
    norms = {
        "dt_layernorm": R,
        "b_layernorm": N,
        "c_layernorm": N,
        "pre_avg_layernorm1": inner,
        "pre_avg_layernorm2": inner,
    }
    w |= {f"{n}.weight": 1 + 0.3 * rng.normal(size=size) for n, size in norms.items()}
    meta, x = rng.normal(size=(M, D)), rng.normal(size=(B, T, D))
    bounds = np.cumsum(sizes)[:-1]
    positions = np.arange(-M, T)  # the text begins at 0

    def lines(tokens, at):
        q, k, v, u, z = np.split(tokens @ w["in_proj.weight"].T, bounds, axis=-1)
        q, k = turned(q.reshape(-1, H, K), at), turned(k.reshape(-1, G, K), at)
        return q, k, v.reshape(len(tokens), G, -1), u, z

    tail, h = np.zeros((TAPS - 1, inner)), np.zeros((inner, N))
    _, meta_k, meta_v, meta_u, _ = lines(meta, positions[:M])
    for u in meta_u:
        _, tail, h = mamba_token(w, tail, u, h)
    w |= {"meta_k": meta_k, "meta_v": meta_v, "meta_h": h, "meta_conv": tail}
    ys = []
    for row in x:
        q, k, v, u, z = lines(np.concatenate([meta, row]), positions)
        k, v = np.repeat(k, H // G, 1), np.repeat(v, H // G, 1)
        query, key = np.arange(M + T)[:, None], np.arange(M + T)
        seen = (key <= query) & ((query - key < W) | (key < M))
        a = np.einsum("hts,shv->thv", softmax(np.where(seen, pairs(q, k) / np.sqrt(K), -np.inf)), v).reshape(
            M + T, inner
        )
        tail, h, outs = np.zeros((TAPS - 1, inner)), np.zeros((inner, N)), []
        for u_t, z_t in zip(u, z):
            o, tail, h = mamba_token(w, tail, u_t, h)
            outs.append(o * silu(z_t))
        both = rms(a, w["pre_avg_layernorm1.weight"]) + rms(np.stack(outs), w["pre_avg_layernorm2.weight"])
        ys.append((both / 2 @ w["out_proj.weight"].T)[M:])
    return w, x, np.stack(ys)


def make():
    """name/weight, name/x and name/y of each."""
    rng, arrays = np.random.default_rng(0), {}
    for name, of in (
        ("hymba", hymba),
        ("lolcats_attention", lolcats),
        ("liger_attention", liger),
        ("head_split", head_split),
    ):
        w, x, y = of(rng)
        arrays |= {f"{name}/{k}": v for k, v in (w | {"x": x, "y": y}).items()}
    return arrays


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("hybrids.npz"), **make())
