"""Makes state_space.npz: state-space mixers and Hyena written from their papers and authors' code, in numpy and float64.

Linear time-invariant ones by their kernel and an FFT convolution, selective ones by a loop over tokens.

python tests/oracles/make_state_space.py
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

B, T, D = 2, 29, 6


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def softplus(x):
    return np.log1p(np.exp(x))


def causal(x, kernel):
    """Convolve x (B T D) along time with kernel (D T), by FFT."""
    spectrum = np.fft.rfft(x, 2 * T, 1) * np.fft.rfft(kernel.T, 2 * T, 0)
    return np.fft.irfft(spectrum, 2 * T, 1)[:, :T]


def short(x, weight, bias=0.0):
    """Depthwise, weight (D 1 W) whose last tap meets the current token."""
    W = weight.shape[2]
    padded = np.concatenate([np.zeros((B, W - 1, x.shape[2])), x], 1)
    return sum(padded[:, i : i + T] * weight[:, 0, i] for i in range(W)) + bias


def cplx(pair):
    return pair[..., 0] + 1j * pair[..., 1]


def dss(w, x):
    """DSS-EXP: eq. of proposition 1 of the paper, with separate step sizes as in the authors' code."""
    A = -np.exp(w["log_A_real"]) + 1j * w["A_imag"]
    dt = np.exp(w["log_dt"])
    dtA = dt[:, :1] * A.real + 1j * dt[:, 1:] * A.imag
    weight = cplx(w["C"]) * (np.exp(dtA) - 1) / A
    kernel = np.einsum("dn,dnt->dt", weight, np.exp(dtA[..., None] * np.arange(T))).real
    return gelu(causal(x, kernel) + w["D"] * x) @ w["out_proj.weight"].T + w["out_proj.bias"]


def gss(w, x):
    A = -np.exp(w["log_A_real"]) + 1j * np.exp(w["log_A_imag"])
    kernel = np.einsum("dn,nt->dt", cplx(w["C"]) * (np.exp(A) - 1) / A, np.exp(A[:, None] * np.arange(T))).real
    u, v = gelu(x @ w["u_proj.weight"].T), gelu(x @ w["v_proj.weight"].T)
    y = causal(u, kernel) + w["D"] * u
    return (y @ w["y_proj.weight"].T * v) @ w["out_proj.weight"].T + w["out_proj.bias"]


def h3(w, x, P=2):
    q, k, v = (x @ w[f"{n}_proj.weight"].T + w[f"{n}_proj.bias"] for n in "qkv")
    k = short(k, w["k_conv1d.weight"])
    A = -np.exp(w["log_A_real"]) + 1j * w["A_imag"]
    dt = np.exp(w["log_dt"])[:, None]
    dA, dB = (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2)
    kernel = 2 * np.einsum("hn,hnt->ht", cplx(w["C"]) * dB, dA[..., None] ** np.arange(T)).real
    y = np.zeros_like(q)
    for head in range(D // P):
        for j in range(P):
            for i in range(P):
                kv = (k[..., head * P + i] * v[..., head * P + j])[..., None]
                S = causal(kv, kernel[head : head + 1]) + w["D"][head] * kv
                y[..., head * P + j] += S[..., 0] * q[..., head * P + i]
    return y @ w["o_proj.weight"].T + w["o_proj.bias"]


def s4(w, x):
    """The kernel C dA^j dB with dense matrices over both halves of the conjugate pairs."""
    Lam, P = -np.exp(w["log_A_real"]) + 1j * w["A_imag"], cplx(w["P"])
    Lam, P, Bc, C = (np.concatenate([v, v.conj()], -1) for v in (Lam, P, cplx(w["B"]), cplx(w["C"])))
    A, one = np.diag(Lam) - np.outer(P, P.conj()), np.eye(len(P))
    kernel = np.zeros((D, T))
    for d, dt in enumerate(np.exp(w["log_dt"])):
        inverse = np.linalg.inv(one - dt / 2 * A)
        dA, h = inverse @ (one + dt / 2 * A), inverse @ (dt * Bc)
        for j in range(T):
            kernel[d, j] = (C[d] @ h).real
            h = dA @ h
    z = gelu(causal(x, kernel) + w["D"] * x) @ w["out_proj.weight"].T + w["out_proj.bias"]
    return z[..., :D] * sigmoid(z[..., D:])


def mamba_lines(w, x, d_state):
    u, z = np.split(x @ w["in_proj.weight"].T, 2, -1)
    u = silu(short(u, w["conv1d.weight"], w["conv1d.bias"]))
    r, b, c = np.split(u @ w["x_proj.weight"].T, [w["x_proj.weight"].shape[0] - 2 * d_state, -d_state], -1)
    return u, z, r, b, c


def mamba_negative(w, x, d_state=4):
    """Mamba with the decay 2 exp(dt A) - 1."""
    u, z, r, b, c = mamba_lines(w, x, d_state)
    dt, A = softplus(r @ w["dt_proj.weight"].T + w["dt_proj.bias"]), -np.exp(w["A_log"])
    h, ys = np.zeros((B, *A.shape)), []
    for t in range(T):
        decay = 2 * np.exp(dt[:, t, :, None] * A) - 1
        h = decay * h + dt[:, t, :, None] * b[:, t, None] * u[:, t, :, None]
        ys.append((h * c[:, t, None]).sum(-1))
    return ((np.stack(ys, 1) + w["D"] * u) * silu(z)) @ w["out_proj.weight"].T


def longhorn(w, x, d_state=4):
    """The step of the authors' code."""
    u, z, r, k, q = mamba_lines(w, x, d_state)
    dt = sigmoid(r @ w["dt_head.weight"].T + w["dt_head.bias"])
    dt = dt / (1 + dt * np.square(k).sum(-1, keepdims=True))
    h, ys = np.zeros((B, u.shape[2], d_state)), []
    for t in range(T):
        dA, dB = 1 - np.einsum("bd,bn->bdn", dt[:, t], k[:, t] ** 2), np.einsum("bd,bn->bdn", dt[:, t], k[:, t])
        h = h * dA + u[:, t, :, None] * dB
        ys.append(np.einsum("bdn,bn->bd", h, q[:, t]))
    return ((np.stack(ys, 1) + w["D"] * u) * silu(z)) @ w["out_proj.weight"].T


def turn(x, angle):
    """Pairs (2i, 2i+1) of x as complex numbers, the first of them turned by the angles (A)."""
    x = x.copy()
    for i, phi in enumerate(angle):
        pair = (x[2 * i] + 1j * x[2 * i + 1]) * np.exp(1j * phi)
        x[2 * i], x[2 * i + 1] = pair.real, pair.imag
    return x


def mamba3(w, x, H=4, G=2, N=6):
    """alpha, beta, gamma and the accumulated angle, head by head and token by token."""
    inner = 2 * D
    P, widths = inner // H, [inner, inner, G * N, G * N, H, H, H]
    z, u, b, c, dt, a, lam, theta = np.split(x @ w["in_proj.weight"].T, np.cumsum(widths), -1)
    dt, lam, a = softplus(dt + w["dt_bias"]), sigmoid(lam), -softplus(a)
    o = np.zeros((B, T, inner))
    for row in range(B):
        for head in range(H):
            S, before, phi, here = np.zeros((P, N)), np.zeros((P, N)), 0.0, slice(head * P, head * P + P)
            for t in range(T):
                step, mix, v = dt[row, t, head], lam[row, t, head], u[row, t, here]
                phi = (phi + math.pi * np.tanh(theta[row, t]) * step) % (2 * math.pi)
                group = slice(head // (H // G) * N, (head // (H // G) + 1) * N)
                k, q = (
                    turn(
                        m[row, t, group] / np.sqrt((m[row, t, group] ** 2).mean() + 1e-5) * w[f"{n}_norm.weight"]
                        + w[f"{n}_bias"][head, 0],
                        phi,
                    )
                    for m, n in ((b, "B"), (c, "C"))
                )
                alpha = np.exp(step * a[row, t, head])
                now = np.outer(v, k)
                S = alpha * S + (1 - mix) * step * alpha * before + mix * step * now
                o[row, t, here] = S @ q + w["D"][head] * v
                before = now
    return (o * silu(z)) @ w["out_proj.weight"].T


def hyena(w, x, order=3, horizon=12, n_bands=3):
    t = np.arange(T)
    f = np.linspace(1e-4, n_bands - 1, n_bands)
    phase = np.exp(-1j * f * (2 * math.pi * t / horizon)[:, None])
    z = np.concatenate([(t / (horizon - 1))[:, None], phase.real, phase.imag], -1)
    z = np.sin(w["filter.frequency"] * (z @ w["filter.first"].T + w["filter.first_bias"]))
    for weight, bias in zip(w["filter.inner"], w["filter.inner_bias"]):
        z = np.sin(w["filter.frequency"] * (z @ weight.T + bias))
    h = z @ w["filter.last"].T
    deltas = np.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, h.shape[1])
    h = (h * np.exp(-(t / (horizon - 1))[:, None] * np.abs(deltas))).T.reshape(order - 1, D, T)
    u = short(x @ w["in_proj.weight"].T + w["in_proj.bias"], w["conv1d.weight"], w["conv1d.bias"])
    *gates, v = np.split(u, order + 1, -1)
    for n, gate in enumerate(reversed(gates[1:])):
        v = v * gate
        v = np.stack([sum(h[n, :, s - r] * v[:, r] for r in range(s + 1)) for s in range(T)], 1) + w["skip"][n] * v
    return (v * gates[0]) @ w["out_proj.weight"].T + w["out_proj.bias"]


MAMBA = {"in_proj.weight": (4 * D, D), "conv1d.weight": (2 * D, 1, 3), "conv1d.bias": (2 * D,), "D": (2 * D,)}
MAMBA |= {"x_proj.weight": (2 + 8, 2 * D), "out_proj.weight": (D, 2 * D)}
LINEAR = {"out_proj.weight": (D, D), "out_proj.bias": (D,)}
CASES = {
    "dss": (dss, LINEAR | {"log_dt": (D, 2), "log_A_real": (4,), "A_imag": (4,), "C": (D, 4, 2), "D": (D,)}),
    "gss": (
        gss,
        {"u_proj.weight": (5, D), "v_proj.weight": (12, D), "y_proj.weight": (12, 5), "out_proj.weight": (D, 12)}
        | {"out_proj.bias": (D,), "log_A_real": (4,), "log_A_imag": (4,), "C": (5, 4, 2), "D": (5,)},
    ),
    "h3": (
        h3,
        {f"{n}_proj.{kind}": (D, D)[: 2 - i] for n in "qkvo" for i, kind in enumerate(("weight", "bias"))}
        | {
            "k_conv1d.weight": (D, 1, 5),
            "log_dt": (3,),
            "log_A_real": (3, 4),
            "A_imag": (3, 4),
            "C": (3, 4, 2),
            "D": (3,),
        },
    ),
    "s4": (
        s4,
        {"log_dt": (D,), "log_A_real": (4,), "A_imag": (4,), "P": (4, 2), "B": (4, 2), "C": (D, 4, 2), "D": (D,)}
        | {"out_proj.weight": (2 * D, D), "out_proj.bias": (2 * D,)},
    ),
    "mamba": (mamba_negative, MAMBA | {"dt_proj.weight": (2 * D, 2), "dt_proj.bias": (2 * D,), "A_log": (2 * D, 4)}),
    "longhorn": (longhorn, MAMBA | {"dt_head.weight": (2 * D, 2), "dt_head.bias": (2 * D,)}),
    "mamba3": (
        mamba3,
        {"in_proj.weight": (4 * D + 24 + 12 + 2, D), "dt_bias": (4,), "B_bias": (4, 1, 6), "C_bias": (4, 1, 6)}
        | {"B_norm.weight": (6,), "C_norm.weight": (6,), "D": (4,), "out_proj.weight": (D, 2 * D)},
    ),
    "hyena": (
        hyena,
        LINEAR
        | {
            "in_proj.weight": (4 * D, D),
            "in_proj.bias": (4 * D,),
            "conv1d.weight": (4 * D, 1, 3),
            "conv1d.bias": (4 * D,),
        }
        | {"filter.first": (5, 7), "filter.first_bias": (5,), "filter.inner": (1, 5, 5), "filter.inner_bias": (1, 5)}
        | {"filter.last": (2 * D, 5), "filter.frequency": (5,), "skip": (2, D)},
    ),
}
SCALES = {"log_dt": (-1.5, 0.5), "log_A_real": (-0.7, 0.3), "A_imag": (3.0, 2.0), "A_log": (-1.0, 0.5)}


def make():
    rng, arrays = np.random.default_rng(0), {}
    for name, (mixer, shapes) in CASES.items():
        weights = {}
        for key, shape in shapes.items():
            matrix = key.endswith("weight") and len(shape) == 2
            mean, size = SCALES.get(key, (0.0, shape[1] ** -0.5 * 1.5 if matrix else 0.7))
            weights[key] = mean + size * rng.standard_normal(shape)
        x = rng.standard_normal((B, T, D))
        arrays |= {f"{name}/x": x, f"{name}/y": mixer(weights, x)} | {f"{name}/{k}": v for k, v in weights.items()}
    return arrays


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("state_space.npz"), **make())
