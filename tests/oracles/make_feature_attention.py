"""Makes feature_attention.npz: layers of linear attention by outside operators, or by another form than the library's own.

Based, ReBased and HGRN2 by the plain PyTorch operators of flash-linear-attention 0.6.0 between products in float32;
Hedgehog, cosFormer, RFA and MetaLA in numpy and float64 by their parallel forms, a T x T matrix of weights.

    pip install torch==2.13.0 triton==3.9.0 fla-core==0.6.0 flash-linear-attention==0.6.0
    TRITON_INTERPRET=1 python tests/oracles/make_feature_attention.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

B, T, D, H = 2, 17, 8, 2
EPS = 1e-6  # added to the sum of the weights
REACH = 9  # of cosFormer: shorter than the text
FEATURE_DIM = 3  # of Based and ReBased


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def by_heads(x):
    return x.reshape(*x.shape[:2], H, -1).swapaxes(1, 2)  # (B H T K)


def joined(o):
    return o.swapaxes(1, 2).reshape(B, T, -1)


def qkv(x, w):
    return [by_heads(x @ w[f"{n}_proj.weight"].T) for n in "qkv"]


def mean(weights, v, w, eps=EPS):
    """Of the values so far, and the last projection."""
    weights = np.tril(weights)
    return joined(weights @ v / (weights.sum(-1, keepdims=True) + eps)) @ w["o_proj.weight"].T


def hedgehog(x, w):
    q, k, v = qkv(x, w)
    q, k = (t @ w[f"feature_map_{n}"].swapaxes(1, 2) for t, n in ((q, "q"), (k, "k")))
    weights = [softmax(s * q) @ softmax(s * k).swapaxes(2, 3) for s in (1, -1)]
    return mean(sum(weights), v, w)


def cosformer(x, w):
    """The cosine of the difference itself, of positions that stop at REACH."""
    q, k, v = qkv(x, w)
    t = np.minimum(np.arange(1, T + 1), REACH)
    fade = np.cos(np.pi / 2 * (t[:, None] - t[None]) / REACH)
    return mean(np.maximum(q, 0) @ np.maximum(k, 0).swapaxes(2, 3) * fade, v, w)


def random_feature_attention(x, w):
    """sin a sin b + cos a cos b = cos(a - b); a token's weight has faded by all gates after its own."""
    q, k, v = qkv(x, w)
    rows = w["sigma"] * w["projection_matrix"]  # (H R K)
    q, k = (t / np.sqrt((t**2).sum(-1, keepdims=True) + 1e-6) @ rows.swapaxes(1, 2) for t in (q, k))
    kernel = np.cos(q[..., :, None, :] - k[..., None, :, :]).mean(-1)
    g = by_heads(sigmoid(x @ w["g_proj.weight"].T + w["g_proj.bias"]))  # (B H T 1)
    faded = np.cumprod(g, 2)
    weights = np.tril(kernel * faded / faded.swapaxes(2, 3) * (1 - g).swapaxes(2, 3))
    total = np.maximum(weights.sum(-1, keepdims=True), 0) + 1e-3
    return joined(weights @ v / total) @ w["o_proj.weight"].T


def metala(x, w):
    """The authors' layer; its recurrence by the parallel form of gated linear attention."""
    padded = np.concatenate([np.zeros((B, 3, D)), x], 1)
    x = silu(sum(padded[:, i : i + T] * w["conv1d.weight"][:, 0, i] for i in range(4)))
    q, v, alpha = (by_heads(x @ w[f"{n}.weight"].T) for n in ("q_proj", "v_proj", "k_gate"))
    alpha = sigmoid(alpha) ** (1 / 16)
    b = np.cumprod(alpha, 2)
    o = np.tril((q * b) @ ((1 - alpha) / b).swapaxes(2, 3)) @ v / q.shape[-1] ** 0.5
    own = (q * (1 - alpha) * w["aug_balance"].reshape(H, 1, -1)).sum(-1, keepdims=True)
    o = o + sigmoid(own * v)
    o = (o - o.mean(-1, keepdims=True)) / np.sqrt(o.var(-1, keepdims=True) + 1e-5)
    return (silu(x @ w["g_proj.weight"].T + w["g_proj.bias"]) * joined(o)) @ w["out_proj.weight"].T


def based(x, w):
    from fla.ops.based.naive import naive_parallel_based

    return joined(in_torch(naive_parallel_based, *qkv(x, w))) @ w["o_proj.weight"].T


def rebased(x, w):
    from fla.ops.rebased.naive import naive_parallel_rebased

    def normal(t, norm):
        t = joined(t)
        t = (t - t.mean(-1, keepdims=True)) / np.sqrt(t.var(-1, keepdims=True) + 1e-5)
        return by_heads(t * w[f"{norm}.weight"] + w[f"{norm}.bias"])

    q, k, v = qkv(x, w)
    return joined(in_torch(naive_parallel_rebased, normal(q, "ln_q"), normal(k, "ln_k"), v)) @ w["o_proj.weight"].T


def hgrn2(x, w):
    """fla's layer: the bound, the gates and the operator as its forward has them."""
    from fla.ops.gla.naive import naive_recurrent_gla

    q, f, i = (x @ w[f"{n}_proj.weight"].T for n in "qfi")
    bound = sigmoid(w["lower_bound"])
    log_f = np.logaddexp(np.log(bound), np.log1p(-bound) + np.log(sigmoid(f)))
    parts = [t.reshape(B, T, H, -1) for t in (silu(q), 1 - np.exp(log_f), i, log_f)]
    o = in_torch(lambda *t: naive_recurrent_gla(*t)[0], *parts).reshape(B, T, D)
    o = o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-5) * w["g_norm.weight"]
    return o @ w["o_proj.weight"].T


def in_torch(operator, *arrays):
    import torch

    return operator(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays)).double().numpy()


SQUARE = {f"{n}_proj.weight": (D, D) for n in "qkvo"}
NARROW = SQUARE | {f"{n}_proj.weight": (H * FEATURE_DIM, D) for n in "qk"}
HALF, K = D // 2, D // H
IN_NUMPY = {
    hedgehog: SQUARE | {"feature_map_q": (H, K, K), "feature_map_k": (H, K, K)},
    cosformer: SQUARE,
    random_feature_attention: SQUARE
    | {"sigma": (H, 1, K), "projection_matrix": (H, 32, K), "g_proj.weight": (H, D), "g_proj.bias": (H,)},
    metala: {"conv1d.weight": (D, 1, 4), "q_proj.weight": (HALF, D), "k_gate.weight": (HALF, D), "aug_balance": (HALF,)}
    | {"v_proj.weight": (D, D), "g_proj.weight": (D, D), "g_proj.bias": (D,), "out_proj.weight": (D, D)},
}
BY_FLA = {
    based: NARROW,
    rebased: NARROW | {f"ln_{n}.{p}": (H * FEATURE_DIM,) for n in "qk" for p in ("weight", "bias")},
    hgrn2: {f"{n}_proj.weight": (D, D) for n in "qfio"} | {"lower_bound": (D,), "g_norm.weight": (D,)},
}


def make(layers):
    """For each layer: its input, its output, and its weights by their names."""
    arrays = {}
    for layer, shapes in layers.items():
        rng = np.random.default_rng(len(arrays))
        x, w = rng.standard_normal((B, T, D)), {n: rng.standard_normal(s) * 0.6 for n, s in shapes.items()}
        arrays |= {f"{layer.__name__}/{n}": a for n, a in {"x": x, "y": layer(x, w), **w}.items()}
    return arrays


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("feature_attention.npz"), **make(IN_NUMPY), **make(BY_FLA))
