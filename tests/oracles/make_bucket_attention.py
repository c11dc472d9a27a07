"""Makes bucket_attention.npz. Reformer: the LSHAttention of reformer-pytorch 1.4.4 with buckets masked and pairs counted once,
between projections written here, and with our rotations in place of random ones; its two chunks a round hold every bucket
whole, so that it shows the definition without the chunking. The others: the papers' equations, in numpy and float64, by
loops over tokens or with T x T masks, independent of the package.

pip install torch==2.13.0 reformer-pytorch==1.4.4
python tests/oracles/make_bucket_attention.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

B, T, D, H = 2, 24, 16, 2
K = D // H
RNG = np.random.default_rng(0)


def draw(*names, width=D):
    return {f"{n}.weight": 0.4 * RNG.standard_normal((width, D)) for n in names}


def heads(x, w, n=H):
    """(B T D) -> (B n T K)"""
    return (x @ w.T).reshape(B, T, n, -1).transpose(0, 2, 1, 3)


def merged(o):
    return o.transpose(0, 2, 1, 3).reshape(B, T, -1)


def rotary(x, positions):
    half = x.shape[-1] // 2
    angle = np.asarray(positions)[:, None] * 10000.0 ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def attend(logits, mask, v):
    logits = np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def reformer(x, n_hashes=3, n_buckets=6):
    import torch
    from reformer_pytorch.reformer_pytorch import LSHAttention

    w = draw("qk_proj", "v_proj", "o_proj") | {"rotations": RNG.standard_normal((H, K, n_hashes, n_buckets // 2))}
    qk, v = (heads(x, w[f"{n}_proj.weight"]) for n in ("qk", "v"))

    class Ours(LSHAttention):
        def hash_vectors(self, _, vecs, **kwargs):
            turned = torch.einsum("bhtk,hkrc->bhrtc", vecs.unflatten(0, (B, H)), torch.from_numpy(w["rotations"]))
            bucket = torch.cat([turned, -turned], -1).argmax(-1)
            return (bucket + n_buckets * torch.arange(n_hashes)[:, None]).flatten(0, 1).flatten(1)

    attention = Ours(bucket_size=T // 2, n_hashes=n_hashes, causal=True, allow_duplicate_attention=False,
                     attend_across_buckets=False).eval()  # fmt: skip
    # theirs divides logits by sqrt(K), the authors' code does not
    o = attention(torch.from_numpy(qk * K**0.5).flatten(0, 1), torch.from_numpy(v).flatten(0, 1))[0]
    return w | {"y": merged(o.unflatten(0, (B, H)).numpy()) @ w["o_proj.weight"].T}


def routing_transformer(x, window=5, n_clusters=3):
    """One local head, one routing head. A cluster's last tokens, by counting how many of it follow."""
    w = draw("q_proj", "v_proj", "o_proj") | draw("k_proj", width=K)
    mu = RNG.standard_normal((1, n_clusters, K))
    w["centroids"] = mu / np.linalg.norm(mu, axis=-1, keepdims=True)
    q, v, k = heads(x, w["q_proj.weight"]), heads(x, w["v_proj.weight"]), heads(x, w["k_proj.weight"], 1)
    shared, local = q[:, :1], q[:, 1:]
    shared = (shared - shared.mean(-1, keepdims=True)) / np.sqrt(shared.var(-1, keepdims=True) + 1e-5)
    distance = ((unit(shared)[..., None, :] - w["centroids"][:, None]) ** 2).sum(-1)
    cluster = distance.argmin(-1)
    same, before = cluster[..., None] == cluster[..., None, :], np.tri(T, dtype=bool)
    since = np.array([[[[same[b, 0, t, s : t + 1].sum() for s in range(T)] for t in range(T)]] for b in range(B)])
    mask = same & before & (since <= window) & ~np.eye(T, dtype=bool)
    mask |= np.eye(T, dtype=bool) & ~mask.any(-1, keepdims=True)
    shared, local, k = (rotary(t, np.arange(T)) for t in (shared, local, k))
    o = attend(shared @ shared.swapaxes(-1, -2) / K**0.5, mask, v[:, :1])
    near = attend(local @ k.swapaxes(-1, -2) / K**0.5, before & ~np.tri(T, k=-window, dtype=bool), v[:, 1:])
    return w | {"y": merged(np.concatenate([o, near], 1)) @ w["o_proj.weight"].T}


def sorting(R, n_iterations):
    """Rows of the causal balancing in linear space: e^R, divided by sums over the rows so far, then over the row."""
    S = np.exp(R) * np.tri(len(R), k=-1)
    for _ in range(n_iterations):
        S = np.divide(S, S.cumsum(0), out=np.zeros_like(S), where=S > 0)
        S[1:] /= S[1:].sum(1, keepdims=True)
    return S


def sinkhorn(x, b=4, n_iterations=3, temperature=0.75):
    w = draw(*(f"{n}_proj" for n in "qkvo"))
    q, k, v = (heads(x, w[f"{n}_proj.weight"]) for n in "qkv")
    o, N = np.zeros_like(v), T // b
    for row, h in np.ndindex(B, H):
        asks = np.stack([q[row, h, : i * b + 1].mean(0) for i in range(N)])
        blocks_k, blocks_v = (t[row, h].reshape(N, b, K) for t in (k, v))
        S = sorting(asks @ blocks_k.mean(1).T / K**0.5 / temperature, n_iterations)
        for t in range(T):
            i = t // b
            keys = rotary(
                np.concatenate([np.tensordot(S[i], blocks_k, 1), blocks_k[i]]), (i - 1) * b + np.arange(2 * b)
            )
            values = np.concatenate([np.tensordot(S[i], blocks_v, 1), blocks_v[i]])
            seen = np.arange(2 * b) <= t - (i - 1) * b
            if i == 0:
                seen[:b] = False
            o[row, h, t] = attend(keys @ rotary(q[row, h, t : t + 1], [t])[0] / K**0.5, seen, values)
    return w | {"y": merged(o) @ w["o_proj.weight"].T}


def memorizing_transformer(x, window=5, top_k=3):
    w = draw(*(f"{n}_proj" for n in "qkvo"))
    w |= {"gate": RNG.standard_normal(H), "attention_scale": 2 + RNG.random(H)}
    q, k, v = (heads(x, w[f"{n}_proj.weight"]) for n in "qkv")
    q, k = w["attention_scale"][:, None, None] * unit(q), unit(k)
    turned = rotary(q, np.arange(T)) @ rotary(k, np.arange(T)).swapaxes(-1, -2)
    far = np.tri(T, k=-window, dtype=bool)
    o = attend(turned, np.tri(T, dtype=bool) & ~far, v)
    scores = np.where(far, q @ k.swapaxes(-1, -2), -np.inf)
    best = far & (scores >= np.sort(scores, -1)[..., -top_k, None])
    g = 1 / (1 + np.exp(-w["gate"][:, None, None]))
    o[:, :, window:] = g * attend(scores, best, v)[:, :, window:] + (1 - g) * o[:, :, window:]
    return w | {"y": merged(o) @ w["o_proj.weight"].T}


def main():
    x = RNG.standard_normal((B, T, D))
    stored = {"x": x}
    for make in (reformer, routing_transformer, sinkhorn, memorizing_transformer):
        with np.errstate(invalid="ignore"):
            stored |= {f"{make.__name__}/{n}": a for n, a in make(x).items()}
    np.savez_compressed(Path(__file__).with_name("bucket_attention.npz"), **stored)


if __name__ == "__main__":
    main()
