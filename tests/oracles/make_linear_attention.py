"""Makes linear_attention.npz: five mixers in numpy and float64, each by another form than the library's own.

Linear Transformer, Performer, GLA and RetNet by their parallel forms, a T x T matrix of weights (RetNet's positions as
complex exponentials, as printed); DeltaNet as one gradient step a token on |S k - v|^2 / 2.

    python tests/oracles/make_linear_attention.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

B, T, D, H = 2, 17, 8, 2
EPS = 1e-6  # of the two normalisers, as in the authors' code


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def by_heads(x):
    return x.reshape(*x.shape[:2], H, -1).swapaxes(1, 2)  # (B H T K)


def joined(o):
    return o.swapaxes(1, 2).reshape(B, T, -1)


def qkv(x, w):
    return [by_heads(x @ w[f"{n}_proj.weight"].T) for n in "qkv"]


def normalised(weights, v):
    weights = np.tril(weights)
    return weights @ v / (weights.sum(-1, keepdims=True) + EPS)


def linear_transformer(x, w):
    """Eq. 9 of arXiv:2006.16236."""
    q, k, v = qkv(x, w)
    q, k = (np.where(t > 0, t + 1, np.exp(t)) for t in (q, k))
    return joined(normalised(q @ k.swapaxes(2, 3), v)) @ w["o_proj.weight"].T


def performer(x, w):
    """Eq. 4 and 5 of arXiv:2009.14794; the feature of a query has 1e-6 of its largest added."""
    q, k, v = qkv(x, w)
    rows = w["projection_matrix"]
    q, k = (t / t.shape[-1] ** 0.25 for t in (q, k))
    q, k = (np.exp(t @ rows.T - (t**2).sum(-1, keepdims=True) / 2) for t in (q, k))
    weights = np.tril((q + EPS * q.max(-1, keepdims=True)) @ k.swapaxes(2, 3))
    return joined(weights @ v / weights.sum(-1, keepdims=True)) @ w["o_proj.weight"].T


def gated_linear_attention(x, w):
    """Eq. 4 of arXiv:2312.06635, with the gate of its section 4.4."""
    q, k, v = qkv(x, w)
    gate = sigmoid(x @ w["gk_proj.0.weight"].T @ w["gk_proj.1.weight"].T + w["gk_proj.1.bias"]) ** (1 / 16)
    b = np.cumprod(by_heads(gate), 2)
    o = np.tril((q * b) @ (k / b).swapaxes(2, 3)) @ v / q.shape[-1] ** 0.5
    o = o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-5) * w["g_norm_swish_gate.weight"]
    return (joined(o) * silu(x @ w["g_proj.weight"].T)) @ w["o_proj.weight"].T


def retnet(x, w):
    """Eq. 5 and 8 of arXiv:2307.08621, without the score normalisations that the group norm undoes."""
    q, k, v = qkv(x, w)
    half = q.shape[-1] // 2
    n, m = np.arange(T)[:, None], np.arange(T)[None]
    turn = np.exp(1j * n * 10000.0 ** (-np.arange(half) / half))
    q, k = ((t[..., :half] + 1j * t[..., half:]) * turn for t in (q, k))
    gamma = (1 - 2.0 ** (-5 - np.arange(H)))[:, None, None]
    decay = np.where(n >= m, gamma ** np.maximum(n - m, 0), 0)
    o = ((q @ k.conj().swapaxes(2, 3)).real * decay / (2 * half) ** 0.5) @ v
    o = (o - o.mean(-1, keepdims=True)) / np.sqrt(o.var(-1, keepdims=True) + 1e-5)
    o = joined(o) * w["g_norm.weight"] + w["g_norm.bias"]
    return (silu(x @ w["g_proj.weight"].T) * o) @ w["o_proj.weight"].T


def deltanet(x, w):
    """Arxiv:2406.06484, section 2.2: S moves by -beta times the gradient of |S k - v|^2 / 2."""

    def line(name):
        padded = np.concatenate([np.zeros((B, 3, D)), x @ w[f"{name}_proj.weight"].T], 1)
        taps = w[f"{name}_conv1d.weight"][:, 0]
        return by_heads(silu(sum(padded[:, i : i + T] * taps[:, i] for i in range(4))))

    q, k, v = (line(n) for n in "qkv")
    q, k = (t / np.sqrt((t**2).sum(-1, keepdims=True) + 1e-6) for t in (q, k))
    beta = sigmoid(x @ w["b_proj.weight"].T)
    S, o = np.zeros((B, H, D // H, D // H)), np.zeros((B, H, T, D // H))
    for t in range(T):
        error = np.einsum("bhvk,bhk->bhv", S, k[:, :, t]) - v[:, :, t]
        S = S - beta[:, t, :, None, None] * error[..., :, None] * k[:, :, t, None, :]
        o[:, :, t] = np.einsum("bhvk,bhk->bhv", S, q[:, :, t]) / (D // H) ** 0.5
    o = o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-5) * w["o_norm.weight"]
    return joined(o) @ w["o_proj.weight"].T


SQUARE = {f"{n}_proj.weight": (D, D) for n in "qkvo"}
SHAPES = {
    linear_transformer: SQUARE,
    performer: SQUARE | {"projection_matrix": (5, D // H)},
    gated_linear_attention: SQUARE
    | {"q_proj.weight": (D // 2, D), "k_proj.weight": (D // 2, D), "g_proj.weight": (D, D)}
    | {"gk_proj.0.weight": (16, D), "gk_proj.1.weight": (D // 2, 16), "gk_proj.1.bias": (D // 2,)}
    | {"g_norm_swish_gate.weight": (D // H,)},
    retnet: SQUARE
    | {"v_proj.weight": (2 * D, D), "g_proj.weight": (2 * D, D), "o_proj.weight": (D, 2 * D)}
    | {"g_norm.weight": (2 * D,), "g_norm.bias": (2 * D,)},
    deltanet: SQUARE
    | {f"{n}_conv1d.weight": (D, 1, 4) for n in "qkv"}
    | {"b_proj.weight": (H, D), "o_norm.weight": (D // H,)},
}


def make():
    """For each mixer: its input, its output, and its weights by their names."""
    rng, arrays = np.random.default_rng(0), {}
    for layer, shapes in SHAPES.items():
        x, w = rng.standard_normal((B, T, D)), {n: rng.standard_normal(s) * 0.6 for n, s in shapes.items()}
        arrays |= {f"{layer.__name__}/{n}": a for n, a in {"x": x, "y": layer(x, w), **w}.items()}
    return arrays


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("linear_attention.npz"), **make())
