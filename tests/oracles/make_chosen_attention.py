"""Makes chosen_attention.npz: layers that choose what they read, with random weights.

moba: the gate of the authors' moba_naive.py (arXiv:2502.13189), rewritten in numpy with its masks of +-inf over T x blocks.
nsa: the compression, ranking and selection of fla 0.6.0's naive operators (which want summaries and blocks of one length)
between projections, phi, window and gates written out here. nsa strided: all of it in numpy, from arXiv:2502.11089, eq. 7 to 12.
dsa: fla 0.6.0's naive_dsa over expanded keys and values.

    pip install torch==2.13.0 triton==3.9.0 fla-core==0.6.0 flash-linear-attention==0.6.0
    TRITON_INTERPRET=1 python tests/oracles/make_chosen_attention.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

B, T, D, H, G = 2, 45, 16, 4, 2
K = D // H


def weights(**shapes):
    return {name.replace("__", "."): 0.4 * torch.randn(shape) for name, shape in shapes.items()}


def projected(x, w, name):
    return (x @ w[f"{name}_proj.weight"].T).unflatten(-1, (-1, K))


def turned(t):
    """Rotary positions, as complex numbers."""
    half = t.shape[-1] // 2
    angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    z = torch.complex(t[..., :half], t[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([z.real, z.imag], -1)


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def moba(x):
    size, top_k = 6, 3
    w = weights(q_proj__weight=(D, D), k_proj__weight=(G * K, D), v_proj__weight=(G * K, D), o_proj__weight=(D, D))
    q, k, v = turned(projected(x, w, "q")), turned(projected(x, w, "k")), projected(x, w, "v")
    k, v = (t.repeat_interleave(H // G, 2) for t in (k, v))
    q, k, v = (t.double().numpy() for t in (q, k, v))
    starts = range(0, T, size)
    gate = np.stack([np.einsum("bthk,bhk->bht", q, k[:, i : i + size].mean(1)) for i in starts], -1)
    for n, i in enumerate(starts):
        gate[:, :, : i + size, n] = -np.inf
        gate[:, :, i : i + size, n] = np.inf
    least = np.sort(gate, -1)[..., -top_k, None]
    met = np.repeat((gate >= least) & (gate > -np.inf), size, -1)[..., :T] & np.tri(T, dtype=bool)
    p = softmax(np.where(met, np.einsum("bthk,bshk->bhts", q, k) / K**0.5, -np.inf))
    o = torch.from_numpy(np.einsum("bhts,bshk->bthk", p, v)).float()
    return w, {"y": o.flatten(2) @ w["o_proj.weight"].T}


def nsa_parts(x, length):
    """Weights; q without and with positions; keys and values of the three branches; summaries of stretches from `begins`."""
    w = weights(q_proj__weight=(D, D), k_proj__weight=(3 * G * K, D), v_proj__weight=(3 * G * K, D))
    w |= weights(o_proj__weight=(D, D), g_proj__weight=(3 * H, D), g_proj__bias=(3 * H,))
    for n in "kv":
        shapes = {"position": (length, G, K), "up__weight": (K, length * K), "down__weight": (K, K)}
        w |= weights(**{f"{n}_compress__{part}": shape for part, shape in shapes.items()})
    q, k, v = (projected(x, w, n) for n in "qkv")
    k, v = k.split(G, 2), v.split(G, 2)

    def summaries(t, name, begins):
        up, down = w[f"{name}_compress.up.weight"], w[f"{name}_compress.down.weight"]
        made = []
        for i in begins:
            hidden = (t[:, i : i + length] + w[f"{name}_compress.position"]).transpose(1, 2).flatten(2) @ up.T
            made.append(hidden * hidden.sigmoid() @ down.T)
        return torch.stack(made, 1)

    return w, q, turned(q), (k[0], turned(k[1]), turned(k[2])), v, summaries


def windowed(q, k, v, window):
    k, v = (t.repeat_interleave(H // G, 2) for t in (k, v))
    logits = torch.einsum("bthk,bshk->bhts", q, k) / K**0.5
    near = torch.ones(T, T, dtype=torch.bool).tril().triu(1 - window)
    return torch.einsum("bhts,bshk->bthk", logits.masked_fill(~near, -torch.inf).softmax(-1), v)


def nsa_output(x, w, branches):
    gates = (x @ w["g_proj.weight"].T + w["g_proj.bias"]).sigmoid().unflatten(-1, (3, H, 1))
    o = sum(gates[:, :, c] * branch for c, branch in enumerate(branches))
    return w, {"y": o.flatten(2) @ w["o_proj.weight"].T}


def nsa(x):
    from fla.ops.nsa.naive import naive_nsa_compression, naive_nsa_selection, naive_nsa_topk

    size, top_k, window = 4, 5, 6
    w, q, q_turned, k, v, summaries = nsa_parts(x, size)
    begins = range(0, T - size + 1, size)
    k_cmp, v_cmp = summaries(k[0], "k", begins), summaries(v[0], "v", begins)
    o_cmp, _ = naive_nsa_compression(q, k_cmp, v_cmp, size, K**-0.5)
    room = torch.zeros(B, 1, G, K)  # the block that the last tokens stand in has no summary yet
    chosen = naive_nsa_topk(q, torch.cat([k_cmp, room], 1), top_k, size, K**-0.5)
    o_slc = naive_nsa_selection(q_turned, k[1], v[1], chosen, size)
    return nsa_output(x, w, (o_cmp, o_slc, windowed(q_turned, k[2], v[2], window)))


def nsa_strided(x):
    """Every sum a loop, with numbers that count from 1 where the paper's do."""
    length, stride, size, top_k, window = 6, 2, 8, 4, 6
    w, q, q_turned, k, v, summaries = nsa_parts(x, length)
    begins = range(0, T - length + 1, stride)
    k_cmp, v_cmp = (f.numpy() for f in (summaries(k[0], "k", begins), summaries(v[0], "v", begins)))
    o_cmp, o_slc = np.zeros((2, B, T, H, K), np.float32)
    lines = [t.numpy() for t in (q, q_turned, k[1], v[1])]
    for b, t in np.ndindex(B, T):
        plain, rotated, k_slc, v_slc = (line[b] for line in lines)
        n = max(0, (t + 1 - length) // stride + 1)
        p = np.zeros((H, n + 1))  # p[h, i] of summary i = 1, 2, ...
        for h in range(H if n else 0):
            p[h, 1:] = softmax(k_cmp[b, :n, h // (H // G)] @ plain[t, h] / K**0.5)
            o_cmp[b, t, h] = p[h, 1:] @ v_cmp[b, :n, h // (H // G)]
        own = t // size + 1
        for g in range(G):
            group = p[g * (H // G) : (g + 1) * (H // G)].sum(0)
            scores = {}
            for j in range(1, own + 1):
                at = [size // stride * j - m - i for m in range(size // stride) for i in range(length // stride)]
                scores[j] = sum(group[a] for a in at if 1 <= a <= n) if 1 < j < own - 1 else np.inf
            best = sorted(scores, key=lambda j: -scores[j])[:top_k]
            seen = [s for s in range(t + 1) if s // size + 1 in best]
            for h in range(g * (H // G), (g + 1) * (H // G)):
                o_slc[b, t, h] = softmax(k_slc[seen, g] @ rotated[t, h] / K**0.5) @ v_slc[seen, g]
    o_cmp, o_slc = torch.from_numpy(o_cmp), torch.from_numpy(o_slc)
    return nsa_output(x, w, (o_cmp, o_slc, windowed(q_turned, k[2], v[2], window)))


def dsa(x):
    from fla.ops.dsa.naive import naive_dsa

    rank, low, nope, rope, value, heads, width, top_k = 10, 12, 6, 4, 5, 16, 8, 9
    w = weights(q_a_proj__weight=(low, D), q_a_layernorm__weight=(low,), q_b_proj__weight=(H * (nope + rope), low))
    w |= weights(kv_a_proj_with_mqa__weight=(rank + rope, D), kv_a_layernorm__weight=(rank,))
    w |= weights(kv_b_proj__weight=(H * (nope + value), rank), o_proj__weight=(D, H * value))
    index = weights(wq_b__weight=(heads * width, low), wk__weight=(width, D), weights_proj__weight=(heads, D))
    index |= weights(k_norm__weight=(width,), k_norm__bias=(width,))

    def normed(t, weight):
        return t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    z = normed(x @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"])
    q = (z @ w["q_b_proj.weight"].T).unflatten(-1, (H, -1))
    c, r = (x @ w["kv_a_proj_with_mqa.weight"].T).split([rank, rope], -1)
    kv = (normed(c, w["kv_a_layernorm.weight"]) @ w["kv_b_proj.weight"].T).unflatten(-1, (H, -1))
    q = torch.cat([q[..., :nope], turned(q[..., nope:])], -1)
    k = torch.cat([kv[..., :nope], turned(r[:, :, None]).expand(-1, -1, H, -1)], -1)
    a = (z @ index["wq_b.weight"].T).unflatten(-1, (heads, -1))
    b = x @ index["wk.weight"].T
    b = (b - b.mean(-1, keepdim=True)) / (b.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    b = (b * index["k_norm.weight"] + index["k_norm.bias"])[:, :, None]
    a, b = (torch.cat([turned(t[..., :rope]), t[..., rope:]], -1) for t in (a, b))
    o = naive_dsa(q, k, kv[..., nope:], a, b[:, :, 0], x @ index["weights_proj.weight"].T, topk=top_k)
    names = {f"latent.{n}": t for n, t in w.items()} | {f"indexer.{n}": t for n, t in index.items()}
    return names, {"y": o.flatten(2) @ w["o_proj.weight"].T}


LAYERS = {"moba": moba, "nsa": nsa, "nsa strided": nsa_strided, "dsa": dsa}


@torch.no_grad()
def make():
    stored = {}
    for i, (name, layer) in enumerate(LAYERS.items()):
        torch.manual_seed(i)
        x = torch.randn(B, T, D)
        made, results = layer(x)
        stored |= {f"{name}/{n}": t.numpy() for n, t in (made | {"x": x} | results).items()}
    return stored


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("chosen_attention.npz"), **make())
