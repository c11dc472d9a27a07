"""Makes slot_attention.npz: layers of the linear family by outside code, or in numpy, each with random weights.

abc, gated_slot_attention, log_linear_attention and mixture_of_memories: the plain operators of fla 0.6.0, with what their
layers put around them written out here (the layers themselves run on a GPU only). gau and linformer: whole layers of
FLASH-pytorch and linformer. synthesizer: numpy, with the T x T matrix.

    pip install torch==2.13.0 triton==3.9.0 fla-core==0.6.0 flash-linear-attention==0.6.0
    pip install --no-deps flash-pytorch==0.1.9 linformer==0.2.3 rotary-embedding-torch
    python tests/oracles/make_slot_attention.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

B, T, D, H = 2, 21, 8, 2
SLOTS, LEVELS, MEMORIES, RANK = 5, 6, 3, 4


def weights(**shapes):
    return {name.replace("__", "."): 0.6 * torch.randn(shape) for name, shape in shapes.items()}


def square(*names):
    return {f"{name}_proj__weight": (D, D) for name in names}


def by_heads(t):
    return t.unflatten(-1, (H, -1))


def rms(t, eps):
    return t / (t.square().mean(-1, keepdim=True) + eps).sqrt()


def turned(t):
    """Rotary positions, as complex numbers."""
    half = t.shape[-1] // 2
    angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    z = torch.complex(t[..., :half], t[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([z.real, z.imag], -1)


def abc(x):
    from fla.ops.abc.naive import naive_recurrent_abc

    w = weights(**square("v", "g", "o"), q_proj__weight=(4, D), k_proj__weight=(4, D), s_proj__weight=(H * SLOTS, D))
    w |= weights(g_norm__weight=(D // H,))
    q, k, v, s, gate = (by_heads(x @ w[f"{n}_proj.weight"].T) for n in "qkvsg")
    line = (t.transpose(1, 2) for t in (turned(q), turned(k), v, s.clamp(-32, 32)))
    o, (K, V) = naive_recurrent_abc(*line, output_final_state=True)
    y = rms(o.transpose(1, 2), 1e-5) * w["g_norm.weight"] * F.silu(gate)
    return w, {"y": y.flatten(2) @ w["o_proj.weight"].T, "K": K, "V": V}


def gated_slot_attention(x):
    from fla.ops.gsa.naive import naive_recurrent_gsa

    w = weights(**square("q", "k", "v", "o"), f_proj__weight=(H * SLOTS, D), g_norm__weight=(D,))
    q, k, v, f = (by_heads(x @ w[f"{n}_proj.weight"].T) for n in "qkvf")
    fade = F.logsigmoid(f) / 8
    line = (F.silu(q), F.silu(k), F.silu(v), 1 - fade.exp(), fade)
    o, (K, V) = naive_recurrent_gsa(*line, scale=1.0, output_final_state=True)
    y = rms(F.silu(o.flatten(2)), 1e-5) * w["g_norm.weight"]
    return w, {"y": y @ w["o_proj.weight"].T, "K": K, "V": V}


def convolved(t, weight, bias=None):
    return F.silu(F.conv1d(F.pad(t.mT, (3, 0)), weight, bias, groups=t.shape[-1]).mT)


def log_linear_attention(x):
    """A block of 16 channels in 2 heads, d_state 6, one group."""
    from fla.ops.log_linear_attn.naive import naive_log_linear_attn

    w = weights(in_proj__weight=(16 + 28 + H * (1 + LEVELS), D), conv1d__weight=(28, 1, 4), conv1d__bias=(28,))
    w |= weights(
        dt_bias=(H,), A_log=(H,), D=(H,), norm__weight=(16,), out_proj__weight=(D, 16), level_weight=(H, LEVELS)
    )
    z, xBC, dt, dl = (x @ w["in_proj.weight"].T).split([16, 28, H, H * LEVELS], -1)
    u, key, query = convolved(xBC, w["conv1d.weight"], w["conv1d.bias"]).split([16, 6, 6], -1)
    u, dt = by_heads(u), F.softplus(dt + w["dt_bias"])
    scales = F.softplus(w["level_weight"] * by_heads(dl))
    o = naive_log_linear_attn(query[:, :, None], key[:, :, None], u * dt[..., None], -w["A_log"].exp() * dt, scales)
    y = rms((o + w["D"][:, None] * u).flatten(2) * F.silu(z), 1e-5) * w["norm.weight"]
    return w, {"y": y @ w["out_proj.weight"].T}


def mixture_of_memories(x):
    """Every row and memory by itself; the last memory is the shared one."""
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    w = weights(
        **square("q", "g", "o"), router__weight=(MEMORIES, D), A_log=(H,), dt_bias=(H,), o_norm__weight=(D // H,)
    )
    w |= weights(**{f"{n}_conv1d__weight": (D, 1, 4) for n in "qkv"})
    for m in range(MEMORIES + 1):
        w |= weights(**{f"memories__{m}__{n}_proj__weight": (D if n in "kv" else H, D) for n in "kvab"})
    o = torch.zeros(B, T, H, D // H)
    for b in range(B):
        p = (x[b] @ w["router.weight"].T).softmax(-1)
        best = p.topk(2, -1)
        share = torch.zeros_like(p).scatter(-1, best.indices, best.values / best.values.sum(-1, keepdim=True))
        share = torch.cat([share, torch.ones(T, 1)], -1)
        for m in range(MEMORIES + 1):
            at = share[:, m].nonzero()[:, 0]
            own = x[b, at][None]
            lines = {n: own @ w["q_proj.weight" if n == "q" else f"memories.{m}.{n}_proj.weight"].T for n in "qkvab"}
            q, k, v = (by_heads(convolved(lines[n], w[f"{n}_conv1d.weight"])) for n in "qkv")
            q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
            fade = -w["A_log"].exp() * F.softplus(lines["a"] + w["dt_bias"])
            read, _ = naive_recurrent_gated_delta_rule(q, k, v, lines["b"].sigmoid(), fade)
            o[b, at] += share[at, m, None, None] * read[0]
    y = rms(o, 1e-5) * w["o_norm.weight"] * F.silu(by_heads(x @ w["g_proj.weight"].T))
    return w, {"y": y.flatten(2) @ w["o_proj.weight"].T}


def gau(x):
    from flash_pytorch import FLASH

    layer = FLASH(dim=D, group_size=4, query_key_dim=6, expansion_factor=2, causal=True, norm_klass=torch.nn.Identity)
    for name, p in layer.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "gamma" in name else 0.0, 0.0 if name.endswith("bias") else 0.5)
    v, u = layer.to_hidden[0].weight.chunk(2)
    order = [0, 2, 1, 3]  # theirs: q, q', k, k'
    by_distance = layer.rel_pos_bias(torch.zeros(4, 4))[3].flip(0)
    w = {"hidden_proj.weight": torch.cat([u, v]), "z_proj.weight": layer.to_qk[0].weight, "bias": by_distance}
    w |= {n: getattr(layer.qk_offset_scale, n)[order] for n in ("gamma", "beta")} | {
        "o_proj.weight": layer.to_out.weight
    }
    return w, {"y": layer(x) - x}


def linformer(x):
    from linformer.linformer import LinformerSelfAttention

    layer = LinformerSelfAttention(D, 30, k=RANK, heads=H)
    for name, p in layer.named_parameters():
        torch.nn.init.normal_(p, 0.0, 0.0 if name.endswith("bias") else 0.5)
    w = {f"{n}_proj.weight": getattr(layer, f"to_{n}").weight for n in ("q", "k", "v")}
    w |= {"o_proj.weight": layer.to_out.weight, "k_mix": layer.proj_k, "v_mix": layer.proj_v}
    return w, {"y": layer(x)}


def synthesizer(kind, rows):
    """A as a whole T x T matrix; rows: of the tables, which know 30 positions."""

    def layer(x):
        columns = 30 if kind == "random" else RANK
        w = weights(**square("v", "o"), **{f"tables__{i}": (H, n, columns) for i, n in enumerate(rows)})
        w |= weights(**square("hidden")) if "dense" in kind else {}
        a = {n: t.numpy() for n, t in w.items()}
        x, tables = x.numpy(), [a[f"tables.{i}"] for i in range(len(rows))]
        if "dense" in kind:
            hidden = np.maximum(x @ a["hidden_proj.weight"].T, 0).reshape(B, T, H, -1).swapaxes(1, 2)
            made = [hidden @ table.swapaxes(1, 2) for table in tables]
            A = made[0] if kind == "dense" else np.tile(made[0], rows[1]) * np.repeat(made[1], rows[0], -1)
        else:
            A = np.broadcast_to(tables[0] if kind == "random" else tables[0] @ tables[1].swapaxes(1, 2), (B, H, 30, 30))
        A = np.where(np.tri(T, dtype=bool), np.exp(A[:, :, :T, :T]), 0)
        v = (x @ a["v_proj.weight"].T).reshape(B, T, H, -1).swapaxes(1, 2)
        o = (A / A.sum(-1, keepdims=True)) @ v
        return w, {"y": torch.from_numpy(o.swapaxes(1, 2).reshape(B, T, D) @ a["o_proj.weight"].T)}

    return layer


LAYERS = {
    "abc": abc,
    "gated_slot_attention": gated_slot_attention,
    "log_linear_attention": log_linear_attention,
    "mixture_of_memories": mixture_of_memories,
    "gau": gau,
    "linformer": linformer,
    "synthesizer dense": synthesizer("dense", [30]),
    "synthesizer factorised_dense": synthesizer("factorised_dense", [6, 5]),
    "synthesizer random": synthesizer("random", [30]),
    "synthesizer factorised_random": synthesizer("factorised_random", [30, 30]),
}


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
    np.savez_compressed(Path(__file__).with_name("slot_attention.npz"), **make())
