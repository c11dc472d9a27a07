"""Makes linear_rnn.npz: classic and linear recurrent nets by other people's code, or by loops in numpy from the papers.

pip install torch==2.13.0 triton==3.9.0 fla-core==0.6.0 flash-linear-attention==0.6.0 minGRU-pytorch==0.2.1 \
    lru-pytorch==0.1.3 gateloop-transformer==0.2.5 rotary-embedding-torch beartype sru==2.6.0
python tests/oracles/make_linear_rnn.py

`golden` holds the loops and needs numpy alone; `outside` needs the packages. Keys are "<mixer>/<array>".
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

B, T, D, H = 2, 30, 6, 5
LMU = {"n_memories": 2, "d_state": 4, "theta": 7.0}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def qrnn(x, w):
    """fo-pooling over masked convolutions; tap k-1 of the weight meets the current token."""
    weight, bias = w["conv.weight"], w["conv.bias"]
    k = weight.shape[2]
    c, ys = np.zeros((B, H)), []
    for t in range(T):
        a = bias + sum(x[:, t - k + 1 + i] @ weight[:, :, i].T for i in range(k) if t - k + 1 + i >= 0)
        z, f, o = np.tanh(a[:, :H]), sigmoid(a[:, H : 2 * H]), sigmoid(a[:, 2 * H :])
        c = f * c + (1 - f) * z
        ys.append(o * c @ w["out_proj.weight"].T)
    return np.stack(ys, 1)


def sru(x, w, scale=3**0.5):
    """Gates that see the last state; the three numbers of a channel lie side by side in the weight."""
    (vf, vr), (bf, br) = w["weight_c"].reshape(2, D), w["bias"].reshape(2, D)
    c, ys = np.zeros((B, D)), []
    for t in range(T):
        u = (x[:, t] @ w["weight"]).reshape(B, D, 3)
        f, r = sigmoid(u[..., 1] + vf * c + bf), sigmoid(u[..., 2] + vr * c + br)
        c = f * c + (1 - f) * u[..., 0]
        ys.append(r * c + (1 - r) * scale * x[:, t])
    return np.stack(ys, 1)


def legendre(order, theta):
    """The entries as the paper has them, discretised by eigenvalues and a solve."""
    a, b = np.zeros((order, order)), np.zeros(order)
    for i in range(order):
        b[i] = (2 * i + 1) * (-1) ** i / theta
        for j in range(order):
            a[i, j] = (2 * i + 1) / theta * (-1 if i < j else (-1) ** (i - j + 1))
    values, vectors = np.linalg.eig(a)
    discrete = (vectors @ np.diag(np.exp(values)) @ np.linalg.inv(vectors)).real
    return discrete, np.linalg.solve(a, (discrete - np.eye(order)) @ b)


def lmu(x, w):
    A, b = legendre(LMU["d_state"], LMU["theta"])
    h, m, ys = np.zeros((B, H)), np.zeros((B, LMU["n_memories"], LMU["d_state"])), []
    for t in range(T):
        u = x[:, t] @ w["e_x"].T + h @ w["e_h"].T + m.reshape(B, -1) @ w["e_m"].T
        m = np.einsum("ij,bnj->bni", A, m) + u[..., None] * b
        h = np.tanh(x[:, t] @ w["W_x"].T + h @ w["W_h"].T + m.reshape(B, -1) @ w["W_m"].T)
        ys.append(h @ w["out_proj.weight"].T)
    return np.stack(ys, 1)


def hgrn(x, w):
    """The complex form, in polar coordinates; norm before gate as in the authors' code."""
    gamma, turn = sigmoid(w["bound"]), np.exp(1j * w["theta"])
    h, ys = np.zeros((B, D), complex), []
    for t in range(T):
        c = silu(x[:, t] @ w["input_proj.weight"].T + w["input_proj.bias"]).reshape(B, D, 2)
        lam = gamma + (1 - gamma) * sigmoid(x[:, t] @ w["lambda_proj.weight"].T + w["lambda_proj.bias"])
        h = lam * turn * h + (1 - lam) * (c[..., 0] + 1j * c[..., 1])
        o = np.concatenate([h.real, h.imag], 1)
        o = (o - o.mean(1, keepdims=True)) / np.sqrt(o.var(1, keepdims=True) + 1e-5)
        o = (o * w["norm.weight"] + w["norm.bias"]) * silu(x[:, t] @ w["gate.weight"].T + w["gate.bias"])
        ys.append(o @ w["out_proj.weight"].T + w["out_proj.bias"])
    return np.stack(ys, 1)


M = LMU["n_memories"] * LMU["d_state"]
SHAPES = {
    "qrnn": {"conv.weight": (3 * H, D, 3), "conv.bias": (3 * H,), "out_proj.weight": (D, H)},
    "sru": {"weight": (D, 3 * D), "weight_c": (2 * D,), "bias": (2 * D,)},
    "lmu": {"e_x": (2, D), "e_h": (2, H), "e_m": (2, M), "W_x": (H, D), "W_h": (H, H), "W_m": (H, M), "out_proj.weight": (D, H)},
    "hgrn": {
        "input_proj.weight": (2 * D, D), "input_proj.bias": (2 * D,), "lambda_proj.weight": (D, D), "lambda_proj.bias": (D,),
        "bound": (D,), "theta": (D,), "gate.weight": (2 * D, D), "gate.bias": (2 * D,),
        "norm.weight": (2 * D,), "norm.bias": (2 * D,), "out_proj.weight": (D, 2 * D), "out_proj.bias": (D,),
    },
}  # fmt: skip
LOOPS = {"qrnn": qrnn, "sru": sru, "lmu": lmu, "hgrn": hgrn}


def golden():
    rng, arrays = np.random.default_rng(0), {}
    for name, shapes in SHAPES.items():
        x = rng.standard_normal((B, T, D))
        w = {n: rng.standard_normal(s) * (0.5 if len(s) == 1 else np.prod(s[1:]) ** -0.5) for n, s in shapes.items()}
        arrays |= {f"{name}/{n}": a for n, a in ({"x": x, "y": LOOPS[name](x, w)} | w).items()}
    return arrays


def numbers(module):
    return {n: p.detach().numpy() for n, p in module.named_parameters()}


def minimal(torch, x):
    """minGRU and minLSTM, whole."""
    from minGRU_pytorch.minGRU import minGRU
    from minGRU_pytorch.minLSTM import minLSTM

    for name, cls in (("mingru", minGRU), ("minlstm", minLSTM)):
        theirs = cls(D, expansion_factor=1.5).double()
        yield name, {"x": x, "y": theirs(x)} | numbers(theirs)


def lru(torch, x):
    """Their recurrence, which is in complex64, with a diagonal D; then the GELU and gated linear unit of minimal-LRU."""
    from LRU_pytorch import LRU

    theirs, x = LRU(D, D, H), x.float()
    d, w1, w2 = torch.randn(D), torch.randn(D, D) / 2, torch.randn(D, D) / 2
    theirs.D.data = torch.diag(d)
    a = torch.nn.functional.gelu(theirs(x), approximate="tanh")
    own = {n: getattr(theirs, n) for n in ("nu_log", "theta_log", "gamma_log")}
    parts = {
        f"{n}_{part}": getattr(getattr(theirs, n), k) for n in "BC" for part, k in (("re", "real"), ("im", "imag"))
    }
    y = (a @ w1.T) * torch.sigmoid(a @ w2.T)
    yield "lru", {"x": x, "y": y, "D": d, "out1.weight": w1, "out2.weight": w2} | own | parts


def gateloop(torch, x):
    """Their operator with as many heads as channels, between the paper's projections."""
    from gateloop_transformer.gateloop_transformer import gate_loop_operator

    shapes = {"qkv_proj": (3 * H, D), "a_proj": (2 * H, D), "g_proj": (H, D), "o_proj": (D, H)}
    w = {f"{n}.weight": torch.randn(s, dtype=x.dtype) / s[1] ** 0.5 for n, s in shapes.items()}
    bias = torch.randn(2 * H, dtype=x.dtype)
    alpha, beta = (x @ w["a_proj.weight"].T + bias).chunk(2, -1)
    a = torch.polar(torch.sigmoid(alpha), beta)
    q, k, v = (t.transpose(1, 2).flatten(0, 1)[..., None] for t in (x @ w["qkv_proj.weight"].T).chunk(3, -1))
    o = gate_loop_operator(q, k, v, a.transpose(1, 2).flatten(0, 1)[..., None, None])
    o = o[..., 0].unflatten(0, (B, H)).transpose(1, 2)
    y = (torch.nn.functional.silu(x @ w["g_proj.weight"].T) * o) @ w["o_proj.weight"].T
    yield "gateloop", {"x": x, "y": y, "a_proj.bias": bias} | w


def hgrn_op(torch, x):
    from fla.ops.hgrn.naive import naive_recurrent_hgrn

    g = torch.nn.functional.logsigmoid(torch.randn(B, T, D))
    h, last = naive_recurrent_hgrn(x.float(), g, output_final_state=True)
    yield "hgrn_op", {"x": x.float(), "g": g, "h": h, "last": last}


def sru_package(torch, x):
    from sru import SRUCell

    theirs = SRUCell(D, D, highway_bias=-0.5)
    theirs.weight_c.data += 0.5
    y, c = theirs(x.float().transpose(0, 1))
    yield "sru_package", {"x": x.float(), "y": y.transpose(0, 1), "c": c} | numbers(theirs)


def outside():
    import torch

    torch.manual_seed(0)
    x, arrays = torch.randn(B, T, D, dtype=torch.float64), {}
    for maker in (minimal, lru, gateloop, hgrn_op, sru_package):
        for name, tensors in maker(torch, x):
            arrays |= {f"{name}/{n}": np.asarray(torch.as_tensor(a).detach()) for n, a in tensors.items()}
    return arrays


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("linear_rnn.npz"), **golden(), **outside())
