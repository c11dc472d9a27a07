"""Makes xlstm_ttt.npz: sLSTM by the authors' package, and the networks trained while they read by loops in numpy.

pip install torch==2.13.0 xlstm==2.0.6 triton==3.9.0 fla-core==0.6.0 flash-linear-attention==0.6.0
TRITON_INTERPRET=1 python tests/oracles/make_xlstm_ttt.py

The loops are written in float64 from arXiv:2407.04620 (sec. 2), 2501.00663 (sec. 3) and 2505.23884 (sec. 3) and the formulas
of the authors' layers: every token's weights are made, row by row and head by head, all gradients are taken by hand
(through LN by its Jacobian), and Newton-Schulz acts on singular values.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

B, T, D, H = 2, 21, 8, 2
K = D // H
TTT_BATCH, CHUNK, WINDOW, CONV = 4, 5, 6, 3
BASE = 10000.0
POLYNOMIALS = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def gelu(x):
    return x * sigmoid(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))


def gelu_slope(x):
    s = sigmoid(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    return s + x * s * (1 - s) * 2 * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)


def layer_norm(z, weight, bias, eps):
    return weight * (z - z.mean()) / np.sqrt(z.var() + eps) + bias


def conv(x, weight, bias=0.0):
    """Depthwise, causal; the last tap meets the current token."""
    y = np.zeros_like(x) + bias
    for t in range(T):
        for i in range(CONV):
            if t - i >= 0:
                y[:, t] += x[:, t - i] * weight[:, 0, CONV - 1 - i]
    return y


def rope(x, position):
    """Pairs (i, i + K/2) of one head turned."""
    y, half = x.copy(), len(x) // 2
    for i in range(half):
        angle = position * BASE ** (-i / half)
        y[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
        y[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
    return y


def network(x, layers):
    """Inputs and outputs of each layer (W, b)."""
    inputs, outputs = [], []
    for n, (W, b) in enumerate(layers):
        inputs.append(gelu(outputs[-1]) if n else x)
        outputs.append(inputs[-1] @ W + b)
    return inputs, outputs


def read(x, layers, norm, eps):
    return layer_norm(network(x, layers)[1][-1], *norm, eps) + x


def gradients(k, v, layers, norm, eps):
    """d/d(W, b) of |LN(net(k)) + k - v|^2 / 2, by hand."""
    inputs, outputs = network(k, layers)
    z = outputs[-1]
    normal = (z - z.mean()) / np.sqrt(z.var() + eps)
    jacobian = (np.eye(K) - 1 / K - np.outer(normal, normal) / K) / np.sqrt(z.var() + eps)
    g = jacobian.T @ (norm[0] * (read(k, layers, norm, eps) - v))
    found = []
    for n in range(len(layers) - 1, -1, -1):
        found.insert(0, (np.outer(inputs[n], g), g))
        if n:
            g = (layers[n][0] @ g) * gelu_slope(outputs[n - 1])
    return found


def added(layers, factor, more):
    return [(W + factor * dW, b + factor * db) for (W, b), (dW, db) in zip(layers, more)]


def averaged(q, k, v, lr, pace, layers, norm):
    """One head of TTT."""
    out = np.zeros_like(q)
    for t in range(T):
        i = t % TTT_BATCH
        if i == 0:
            start, total = (layers if t == 0 else now), added(layers, -1.0, layers)
        total = added(total, lr[t], gradients(k[t], v[t], start, norm, 1e-6))
        now = added(start, -pace[i], total)
        out[t] = read(q[t], now, norm, 1e-6)
    return out


def with_momentum(q, k, v, theta, eta, alpha, layers, norm):
    """One head of Titans."""
    out, M, Z = np.zeros_like(q), layers, added(layers, -1.0, layers)
    for t in range(T):
        if t % TTT_BATCH == 0:
            start = M
        g = gradients(k[t], v[t], start, norm, 0.1)
        Z = [(eta[t] * z - theta[t] * d, c) for (z, c), (d, _) in zip(Z, g)]
        M = [((1 - alpha[t]) * m + z, b) for (m, b), (z, _) in zip(M, Z)]
        out[t] = read(q[t], M, norm, 0.1)
    return out


def by_heads(x):
    return x.reshape(B, T, H, -1)


def over_heads(f, *lines):
    """f of each row and head's lines (T ...), and the head's number."""
    out = np.zeros((B, T, H, K))
    for row in range(B):
        for h in range(H):
            out[row, :, h] = f(h, *(line[row, :, h] for line in lines))
    return out


def ttt(x, w):
    q, k = (conv(x @ w[f"ttt.{n}_proj.weight"].T, w[f"ttt.convs.{n}.weight"], w[f"ttt.convs.{n}.bias"]) for n in "qk")
    q, k, v = by_heads(q), by_heads(k), by_heads(x @ w["ttt.v_proj.weight"].T)
    lr = sigmoid(x @ w["ttt.lr_proj.weight"].T + w["ttt.lr_proj.bias"]) / K
    pace = np.maximum(0, 1 / np.arange(1, TTT_BATCH + 1) + w["ttt.learnable_token_idx"])
    depth = sum(n.startswith("ttt.W") for n in w)

    def head(h, q, k, v, lr):
        q, k = (np.stack([rope(line[t], t % TTT_BATCH) for t in range(T)]) for line in (q, k))
        layers = [(w[f"ttt.W{n}"][h], w[f"ttt.b{n}"][h, 0]) for n in range(1, depth + 1)]
        return averaged(q, k, v, lr, pace, layers, (w["ttt.ttt_norm_weight"][h], w["ttt.ttt_norm_bias"][h]))

    o = over_heads(head, q, k, v, lr).reshape(B, T, D)
    for row in range(B):
        for t in range(T):
            o[row, t] = layer_norm(o[row, t], w["ttt.post_norm.weight"], w["ttt.post_norm.bias"], 1e-6)
    return (gelu(x @ w["ttt.g_proj.weight"].T) * o) @ w["ttt.o_proj.weight"].T


def titans(x, w):
    q, k, v = (by_heads(silu(conv(x @ w[f"{n}_proj.weight"].T, w[f"{n}_conv1d.weight"]))) for n in "qkv")
    q, k = (t / np.sqrt((t * t).sum(-1, keepdims=True) + 1e-6) for t in (q, k))
    theta, eta, alpha = (sigmoid(x @ w[f"{n}_proj.weight"].T + w[f"{n}_proj.bias"]) for n in ("theta", "eta", "alpha"))
    depth = sum(n.startswith("M.") for n in w)

    def head(h, *lines):
        layers = [(w[f"M.{n}"][h], np.zeros(w[f"M.{n}"].shape[2])) for n in range(depth)]
        return with_momentum(*lines, layers, (w["norm_weight"][h], w["norm_bias"][h]))

    o = over_heads(head, q, k, v, theta / K, eta, alpha)
    o = o / np.sqrt((o * o).mean(-1, keepdims=True) + 1e-6) * w["o_norm.weight"]
    return (o.reshape(B, T, D) * silu(x @ w["g_proj.weight"].T)) @ w["o_proj.weight"].T


def orthogonalised(G):
    U, s, Vt = np.linalg.svd(G, full_matrices=False)
    s = s / (np.sqrt((s * s).sum()) + 1e-7)
    for a, b, c in POLYNOMIALS:
        s = a * s + b * s**3 + c * s**5
    return U @ np.diag(s) @ Vt


def large_chunks(q, k, v, lr, momentum, W):
    """One head of LaCT; W is [w0, w1, w2] with inputs as rows."""
    out, first = np.zeros_like(q), [np.sqrt((w * w).sum(0)) for w in W]
    g, G, share = [0.0] * 3, [0.0] * 3, 0.0
    for t in range(T):
        out[t] = (silu(q[t] @ W[0]) * (q[t] @ W[2])) @ W[1]
        gate, up, back = k[t] @ W[0], k[t] @ W[2], W[1] @ v[t]
        s = sigmoid(gate)
        at_gate = back * up * s * (1 + gate * (1 - s))
        grads = [np.outer(k[t], at_gate), np.outer(silu(gate) * up, v[t]), np.outer(k[t], back * silu(gate))]
        g = [a + r * b for a, r, b in zip(g, lr[t], grads)]
        share += momentum[t] / CHUNK
        if t % CHUNK == CHUNK - 1:
            G = [a + share * b for a, b in zip(g, G)]
            W = [w + orthogonalised(u) for w, u in zip(W, G)]
            W = [w / (np.sqrt((w * w).sum(0)) + 1e-5) * n for w, n in zip(W, first)]
            g, share = [0.0] * 3, 0.0
    return out


def window_attention(q, k, v):
    out = np.zeros_like(q)
    for t in range(T):
        seen = range(max(0, t - WINDOW + 1), t + 1)
        p = np.exp([q[t] @ k[s] / np.sqrt(len(q[t])) for s in seen])
        out[t] = sum(a * v[s] for a, s in zip(p / p.sum(), seen))
    return out


def lact(x, w):
    """As many heads of the network as of attention, so that both are turned alike."""
    flat = [x @ w[f"{n}_proj.weight"].T for n in "qkv"]
    fast = [silu(flat[n] * w["qk_scale"][n] + w["qk_offset"][n]) for n in range(2)]
    fast = [by_heads(t) / np.sqrt((by_heads(t) ** 2).sum(-1, keepdims=True) + 1e-6) for t in fast]
    lr = np.log1p(np.exp(x @ w["lr_proj.weight"].T + w["lr_proj.bias"] + np.log(np.expm1(0.001)))).reshape(B, T, H, 3)
    momentum, scale = (
        f(x @ w[f"{n}_proj.weight"].T + w[f"{n}_proj.bias"]) for f, n in ((sigmoid, "momentum"), (silu, "scale"))
    )

    def turned(line):
        return np.stack([rope(line[t], t) for t in range(T)])

    def head(h, q, k, v, fast_q, fast_k, fast_v, lr, momentum, scale):
        near = window_attention(turned(q), turned(k), v)
        W = [w[f"fast.{n}"][h] for n in range(3)]
        far = large_chunks(turned(fast_q), turned(fast_k), fast_v, lr, momentum, W)
        far = far / np.sqrt((far * far).mean(-1, keepdims=True) + 1e-5) * w["fast_norm.weight"]
        return near + scale[:, None] * far

    lines = [by_heads(t) for t in flat] + [*fast, by_heads(silu(flat[2])), lr, momentum, scale]
    return over_heads(head, *lines).reshape(B, T, D) @ w["o_proj.weight"].T


def shapes():
    square = dict.fromkeys(
        ("q_proj.weight", "k_proj.weight", "v_proj.weight", "g_proj.weight", "o_proj.weight"), (D, D)
    )
    ttt_linear = square | {"lr_proj.weight": (H, D), "lr_proj.bias": (H,), "learnable_token_idx": (TTT_BATCH,)}
    ttt_linear |= {f"convs.{n}.weight": (D, 1, CONV) for n in "qk"} | {f"convs.{n}.bias": (D,) for n in "qk"}
    ttt_linear |= {f"{n}norm{s}weight": z for n, s, z in (("ttt_", "_", (H, K)), ("post_", ".", (D,)))}
    ttt_linear |= {f"{n}norm{s}bias": z for n, s, z in (("ttt_", "_", (H, K)), ("post_", ".", (D,)))}
    rates = {f"{n}_proj.weight": (H, D) for n in ("theta", "eta", "alpha")}
    rates |= {f"{n}_proj.bias": (H,) for n in ("theta", "eta", "alpha")}
    own = {"norm_weight": (H, K), "norm_bias": (H, K), "o_norm.weight": (K,), "M.0": (H, K, 6), "M.1": (H, 6, K)}
    fast = {"qk_scale": (2, D), "qk_offset": (2, D), "fast_norm.weight": (K,)}
    fast |= {"fast.0": (H, K, 6), "fast.1": (H, 6, K), "fast.2": (H, K, 6), "lr_proj.weight": (3 * H, D)}
    fast |= {"lr_proj.bias": (3 * H,), "momentum_proj.weight": (H, D), "momentum_proj.bias": (H,)}
    fast |= {"scale_proj.weight": (H, D), "scale_proj.bias": (H,)}
    one, two = {"W1": (H, K, K), "b1": (H, 1, K)}, {"W1": (H, K, 6), "b1": (H, 1, 6), "W2": (H, 6, K), "b2": (H, 1, K)}
    return {
        "ttt_linear": {f"ttt.{n}": s for n, s in (ttt_linear | one).items()},
        "ttt_mlp": {f"ttt.{n}": s for n, s in (ttt_linear | two).items()},
        "titans": square | rates | own | {f"{n}_conv1d.weight": (D, 1, CONV) for n in "qkv"},
        "lact": {n: s for n, s in square.items() if n != "g_proj.weight"} | fast,
    }


LOOPS = {"ttt_linear": ttt, "ttt_mlp": ttt, "titans": titans, "lact": lact}


def make_loops():
    rng, arrays = np.random.default_rng(0), {}
    x = arrays["x"] = rng.standard_normal((B, T, D))
    for name, table in shapes().items():
        w = {n: rng.standard_normal(s) * (s[-1] ** -0.5 if len(s) > 1 else 0.3) for n, s in table.items()}
        w |= {n: 1 + 0.3 * w[n] for n in w if ("norm" in n and "weight" in n) or n == "qk_scale"}
        arrays |= {f"{name}/{n}": a for n, a in (w | {"y": LOOPS[name](x, w)}).items()}
    return arrays


def make_slstm():
    """Gates are those that the layer uses: what its fgate makes enters as i, what its igate makes as f."""
    import torch
    from xlstm.blocks.slstm.layer import sLSTMLayer, sLSTMLayerConfig

    torch.manual_seed(0)
    settings = {"backend": "vanilla", "dtype": "float32", "enable_automatic_mixed_precision": False}
    layer = sLSTMLayer(sLSTMLayerConfig(embedding_dim=D, num_heads=H, conv1d_kernel_size=4, **settings))
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(0.7 * torch.randn_like(p))
        x = 2 * torch.randn(B, T, D)
        y = layer(x)
    w = {n: p.detach().numpy() for n, p in layer.named_parameters()}
    weights = {
        "conv1d.weight": w["conv1d.conv.weight"],
        "conv1d.bias": w["conv1d.conv.bias"],
        "input_weight": np.stack([w[f"{n}gate.weight"] for n in "fizo"]),
        "recurrent_weight": w["slstm_cell._recurrent_kernel_"].reshape(H, 4, K, K).transpose(1, 0, 2, 3),
        "bias": w["slstm_cell._bias_"].reshape(4, H, K),
        "norm.weight": 1 + w["group_norm.weight"],
        "norm.bias": np.zeros(D, np.float32),
    }
    return {f"slstm/{n}": a for n, a in ({"x": x.numpy(), "y": y.numpy()} | weights).items()}


def make_rates():
    """How fla combines the rates of Titans within a chunk: factors of M_0, of Z_0, and of the gradients, and for Z."""
    import torch
    from fla.ops.titans.naive import combine_params

    torch.manual_seed(0)
    theta, alpha, eta = (torch.rand(B, H, 9, 1, dtype=torch.float64) for _ in range(3))
    on_M, _, on_Z, _, _, on_g, left, put = combine_params(theta, alpha, eta, 9)
    found = {"theta": theta, "alpha": alpha, "eta": eta}
    found |= {"on_M": on_M, "on_Z": on_Z, "on_g": on_g.tril(), "left": left, "put": put}
    return {f"rates/{n}": t.numpy() for n, t in found.items()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("xlstm_ttt.npz"), **make_loops(), **make_slstm(), **make_rates())
