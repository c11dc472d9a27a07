"""Makes latent_attention.npz: layers with small caches, each in plain numpy in float64 with the T x T matrix, with random weights.

Written after the authors' layers: LlamaFlashGLA and LlamaFlashGTA of Dao-AILab/grouped-latent-attention (commit 17889db), their
biases left out; CPLinear and CausalSelfAttention of tensorgi/TPA (model/T6.py), whose rope turns the other way round.

    python tests/oracles/make_latent_attention.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

B, T, D, H = 2, 17, 12, 4
HEAD, ROPE, LATENTS, RANK, Q_RANK = 6, 4, 2, 5, 7  # grouped latent attention
TIED, TIED_HEAD = 2, 8  # grouped-tied attention: states, and their width
RANKS = {"q": 3, "k": 2, "v": 1}  # tensor product attention


def draw(rng, **shapes):
    return {name.replace("__", "."): 0.6 * rng.standard_normal(shape) for name, shape in shapes.items()}


def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def turned(x, sign=1.0):
    """(B T ... K) by its position, pairs (i, i + K/2)."""
    half = x.shape[-1] // 2
    angle = sign * np.arange(T)[:, None] * 10000.0 ** (-np.arange(half) / half)
    angle = angle.reshape(T, *[1] * (x.ndim - 3), half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def attended(q, k, v):
    """(B T H K), (B T H K), (B T H V) -> (B T H*V)."""
    logits = np.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    logits = np.where(np.tril(np.ones((T, T), bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhts,bshv->bthv", weights, v).reshape(B, T, -1)


def grouped_latent_attention(rng, x):
    w = draw(
        rng,
        q_a_proj__weight=(Q_RANK, D),
        q_a_layernorm__weight=(Q_RANK,),
        q_b_proj__weight=(H * (HEAD + ROPE), Q_RANK),
        kv_a_proj_with_mqa__weight=(LATENTS * RANK + ROPE, D),
        kv_a_layernorm__weight=(LATENTS * RANK,),
        kv_b_proj__weight=(H * 2 * HEAD, RANK),
        o_proj__weight=(D, H * HEAD),
    )
    q = rms(x @ w["q_a_proj.weight"].T) * w["q_a_layernorm.weight"] @ w["q_b_proj.weight"].T
    q = q.reshape(B, T, H, HEAD + ROPE)
    down = x @ w["kv_a_proj_with_mqa.weight"].T
    r = turned(down[..., None, LATENTS * RANK :])
    keys, values = [], []
    for g in range(LATENTS):
        part = slice(g * RANK, (g + 1) * RANK)
        c = rms(down[..., part]) * w["kv_a_layernorm.weight"][part]
        rows = w["kv_b_proj.weight"].reshape(LATENTS, -1, RANK)[g]
        up = (c @ rows.T).reshape(B, T, H // LATENTS, 2 * HEAD)
        keys.append(up[..., :HEAD])
        values.append(up[..., HEAD:])
    k = np.concatenate([np.concatenate(keys, 2), np.broadcast_to(r, (B, T, H, ROPE))], -1)
    q = np.concatenate([q[..., :HEAD], turned(q[..., HEAD:])], -1)
    return w, attended(q, k, np.concatenate(values, 2)) @ w["o_proj.weight"].T


def grouped_tied_attention(rng, x):
    width, half = H * TIED_HEAD, TIED_HEAD // 2
    w = draw(
        rng,
        q_proj__weight=(width, width),
        kv_proj__weight=(TIED * TIED_HEAD, width),
        k_rope_proj__weight=(half, width),
        o_proj__weight=(width, width),
    )
    q, kv, r = (x @ w[f"{n}_proj.weight"].T for n in ("q", "kv", "k_rope"))
    q, kv = q.reshape(B, T, H, TIED_HEAD), kv.reshape(B, T, TIED, TIED_HEAD).repeat(H // TIED, 2)
    q = np.concatenate([q[..., :half], turned(q[..., half:])], -1)
    k = np.concatenate([kv[..., :half], turned(r[:, :, None]).repeat(H, 2)], -1)
    return w, attended(q, k, kv) @ w["o_proj.weight"].T


def tpa(rng, x):
    w = draw(rng, o_proj__weight=(D, H * HEAD))
    heads = {}
    for n, rank in RANKS.items():
        w[f"a_proj.{n}.weight"], w[f"b_proj.{n}.weight"] = draw(rng, a=(H * rank, D), b=(rank * HEAD, D)).values()
        a = (x @ w[f"a_proj.{n}.weight"].T).reshape(B, T, H, rank)
        b = (x @ w[f"b_proj.{n}.weight"].T).reshape(B, T, rank, HEAD)
        heads[n] = a @ (b if n == "v" else turned(b, -1.0)) / rank
    return w, attended(heads["q"], heads["k"], heads["v"]) @ w["o_proj.weight"].T


MIXERS = {f.__name__: f for f in (grouped_latent_attention, grouped_tied_attention, tpa)}
WIDTHS = {"grouped_tied_attention": H * TIED_HEAD}


def golden():
    arrays = {}
    for i, (name, layer) in enumerate(MIXERS.items()):
        rng = np.random.default_rng(i)
        x = rng.standard_normal((B, T, WIDTHS.get(name, D)))
        w, y = layer(rng, x)
        arrays |= {f"{name}/x": x, f"{name}/y": y} | {f"{name}/w/{n}": a for n, a in w.items()}
    return arrays


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("latent_attention.npz"), **golden())
