"""Makes delta_family.npz: mixers of the delta rule's kind, put together from the plain operators of
flash-linear-attention 0.6.0 (which compute in float32) and torch's own convolution, as its layers do.

pip install torch==2.13.0 triton==3.9.0 fla-core==0.6.0 flash-linear-attention==0.6.0
TRITON_INTERPRET=1 python tests/oracles/make_delta_family.py

Where these layers differ from fla's: comba's p is c times the unit key (fla's kernel gives p unit length, whatever c is);
the forgetting transformer's shift is that of its authors' repository, zhixuan-lin/forgetting-transformer.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

B, T, D, H, K, V = 2, 21, 16, 2, 4, 6


def draw(**shapes):
    """Weights, large enough for every term to matter."""
    return {n: torch.randn(s) * (0.3 if len(s) > 1 else 0.5) for n, s in shapes.items()}


def conv(x, weight):
    return F.silu(F.conv1d(F.pad(x.mT, (weight.shape[-1] - 1, 0)), weight, groups=weight.shape[0]).mT)


def by_heads(x, n):
    return x.unflatten(-1, (n, -1))


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def lines(w, x, names="qkv"):
    """Projected and convolved."""
    return [conv(x @ w[f"{n}_proj.weight"].T, w[f"{n}_conv1d.weight"]) for n in names]


def decay(w, x):
    return -w["A_log"].exp() * F.softplus(x @ w["a_proj.weight"].T + w["dt_bias"])


def delta_weights(k, v, conv_size=4, **more):
    shapes = {f"{n}_proj.weight": (width, D) for n, width in (("q", H * K), ("k", k), ("v", v), ("g", H * V))}
    shapes |= {f"{n}_conv1d.weight": (width, 1, conv_size) for n, width in (("q", H * K), ("k", k), ("v", v))}
    return draw(**shapes | {"a_proj.weight": (H, D), "A_log": (H,), "dt_bias": (H,), "o_proj.weight": (D, H * V),
                            "o_norm.weight": (V,)} | more)  # fmt: skip


def comba(x):
    from fla.ops.comba.naive import naive_recurrent_comba

    w = delta_weights(H * K, H * V, **{"b_proj.weight": (H, D), "decay": (H,), "D": (H,)})
    q, k, v = (by_heads(t, H) for t in lines(w, x))
    c, beta = w["decay"].sigmoid()[:, None], (x @ w["b_proj.weight"].T).sigmoid()
    q, k = unit(q - w["D"][:, None] * (k * c)), unit(k)
    o, S = naive_recurrent_comba(q, k, v, c * k, beta, decay(w, x), output_final_state=True)
    gate = by_heads(x @ w["g_proj.weight"].T, H).sigmoid()
    return w | {"y": (rms(o, w["o_norm.weight"], 1e-5) * gate).flatten(2) @ w["o_proj.weight"].T, "state/S": S}


def gated_deltaproduct(x, n=3):
    from fla.ops.gated_delta_product.naive import naive_recurrent_gated_delta_product

    w = delta_weights(n * H * K, n * H * V, **{"b_proj.weight": (n * H, D)})
    q, k, v = lines(w, x)
    k, v = (t.unflatten(-1, (n, H, -1)).flatten(1, 2) for t in (k, v))
    beta = 2 * (x @ w["b_proj.weight"].T).sigmoid().unflatten(-1, (n, H)).flatten(1, 2)
    o, S = naive_recurrent_gated_delta_product(
        unit(by_heads(q, H)), unit(k), v, decay(w, x), beta, K**-0.5, output_final_state=True, num_householder=n
    )
    gate = F.silu(by_heads(x @ w["g_proj.weight"].T, H))
    return w | {"y": (rms(o, w["o_norm.weight"], 1e-5) * gate).flatten(2) @ w["o_proj.weight"].T, "state/S": S}


def forgetting_transformer(x, G=1):
    from fla.ops.forgetting_attn.naive import naive_forgetting_attn

    heads = D // H
    w = draw(
        **{f"{n}_proj.weight": (s, D) for n, s in (("q", D), ("k", G * heads), ("v", G * heads), ("g", D), ("o", D))}
    )
    w |= draw(**{"f_proj.weight": (H, D), "f_proj.bias": (H,), "k_shift.weight": (G, D), "v_shift.weight": (G, D)})
    w |= draw(q_norm=(H, heads), k_norm=(G, heads), o_norm=(H, heads))
    q, k, v, gate = (by_heads(x @ w[f"{n}_proj.weight"].T, m) for n, m in (("q", H), ("k", G), ("v", G), ("g", H)))

    def shift(u, name):
        alpha = (x @ w[f"{name}_shift.weight"].T).sigmoid()[..., None]
        before = torch.roll(u, 1, 1)
        before[:, 0] = 0
        return alpha * before + (1 - alpha) * u

    g = F.logsigmoid(x @ w["f_proj.weight"].T + w["f_proj.bias"])
    k, v = rms(shift(k, "k"), w["k_norm"], 1e-6), shift(v, "v")
    o = naive_forgetting_attn(rms(q, w["q_norm"], 1e-6), k, v, g)
    return w | {"y": (rms(o, w["o_norm"], 1e-6) * gate.sigmoid()).flatten(2) @ w["o_proj.weight"].T}


def path_attention(x, G=1, rank=3):
    from fla.ops.path_attn.naive import naive_path_attn

    heads = D // H
    w = draw(**{f"{n}_proj.weight": (s, D) for n, s in (("q", D), ("k", G * heads), ("v", G * heads), ("o", D))})
    w |= draw(
        **{"w_proj.0.weight": (rank, D), "w_proj.1.weight": (G * heads, rank), "w_conv1d.weight": (G * heads, 1, 3)}
    )
    w |= draw(**{"bt_proj.weight": (G, D), "bt_proj.bias": (G,), "g_proj.weight": (H, D), "g_proj.bias": (H,)})
    q, k, v = (by_heads(x @ w[f"{n}_proj.weight"].T, m) for n, m in (("q", H), ("k", G), ("v", G)))
    turn = unit(by_heads(conv(x @ w["w_proj.0.weight"].T @ w["w_proj.1.weight"].T, w["w_conv1d.weight"]), G))
    beta = 2 * (x @ w["bt_proj.weight"].T + w["bt_proj.bias"]).sigmoid()
    g = F.logsigmoid(x @ w["g_proj.weight"].T + w["g_proj.bias"])
    o = naive_path_attn(q, k, v, turn, beta, g, heads**-0.5, chunk_size=8)
    return w | {"y": o.flatten(2) @ w["o_proj.weight"].T}


def deltaformer_op():
    """The values' keys w are the queries here, as in fla; in the mixer they are the keys."""
    from fla.ops.deltaformer.naive import naive_deltaformer_attn

    q, k, v, beta = torch.randn(B, T, H, K), torch.randn(B, T, H, K), torch.randn(B, T, H, K), torch.rand(B, T, H)
    return {"q": q, "k": k, "v": v, "beta": beta, "o": naive_deltaformer_attn(q, k, v, beta)}


def mesanet(x):
    """Five steps of conjugate gradients; the exact solution; and the last token by their decoding, in 30 steps of its own."""
    from fla.ops.mesa_net.naive import naive_mesa_net_CG, naive_mesa_net_decoding_one_step, naive_mesa_net_exact

    w = draw(**{f"{n}_proj.weight": (s, D) for n, s in (("q", H * K), ("k", H * K), ("v", H * K), ("a", H), ("b", H))})
    w |= draw(**{"q_conv1d.weight": (H * K, 1, 4), "k_conv1d.weight": (H * K, 1, 4), "a_proj.bias": (H,)})
    w |= draw(**{"b_proj.bias": (H,), "lambda_params": (H * K,), "o_proj.weight": (D, H * K), "o_norm.weight": (K,)})
    q, k = (unit(by_heads(t, H)) for t in lines(w, x, "qk"))
    v = by_heads(x @ w["v_proj.weight"].T, H)
    g = F.logsigmoid(x @ w["a_proj.weight"].T + w["a_proj.bias"])
    beta = (x @ w["b_proj.weight"].T + w["b_proj.bias"]).sigmoid()
    lam = by_heads(F.softplus(w["lambda_params"]) + 0.25, H)
    o, R, G = naive_mesa_net_CG(q, k, v, g, lam, beta, chunk_size=7, max_CG_iteration=5)
    exact, _, _ = naive_mesa_net_exact(q, k, v, g, lam, beta)
    _, R1, G1 = naive_mesa_net_exact(q[:, :-1], k[:, :-1], v[:, :-1], g[:, :-1], lam, beta[:, :-1])
    last, *_ = naive_mesa_net_decoding_one_step(*(t[:, -1] for t in (q, k, v, g)), lam, beta[:, -1], R1, G1)
    ys = {"y": o, "y_exact": exact, "y_last": last}
    ys = {n: rms(t, w["o_norm.weight"], 1e-5).flatten(-2) @ w["o_proj.weight"].T for n, t in ys.items()}
    return w | ys | {"state/S": torch.cat([R, G], -1)}


def make():
    torch.manual_seed(0)
    x = torch.randn(B, T, D)
    made = {"x": x} | {f"deltaformer_op/{n}": t for n, t in deltaformer_op().items()}
    for mixer in (comba, gated_deltaproduct, forgetting_transformer, path_attention, mesanet):
        made |= {f"{mixer.__name__}/{n}": t for n, t in mixer(x).items()}
    return {n: t.float().numpy() for n, t in made.items()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("delta_family.npz"), **make())
