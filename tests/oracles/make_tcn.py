"""Makes tcn.npz: the residual block of figure 1 of arXiv:1803.01271 as a loop over time and taps, in numpy and float64.

python tests/oracles/make_tcn.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

B, T, D, H, LEVELS, W = 2, 30, 6, 5, 3, 3


def conv(x, weight, bias, dilation):
    """F(s) = sum_i f(i) x_{s - d i}, eq. 2, then ReLU; tap W-1 of weight (O I W) meets the current token."""
    y = np.zeros((B, T, weight.shape[0])) + bias
    for t in range(T):
        for i in range(W):
            if t - dilation * i >= 0:
                y[:, t] += x[:, t - dilation * i] @ weight[:, :, W - 1 - i].T
    return np.maximum(y, 0)


def network(x, w):
    x = x @ w["in_proj.weight"].T + w["in_proj.bias"]
    for level in range(LEVELS):
        y = x
        for n in (2 * level, 2 * level + 1):
            y = conv(y, w[f"network.{n}.weight"], w[f"network.{n}.bias"], 2**level)
        x = np.maximum(x + y, 0)
    return x @ w["out_proj.weight"].T + w["out_proj.bias"]


def make():
    rng = np.random.default_rng(0)
    weights = {"in_proj.weight": rng.standard_normal((H, D)) * D**-0.5, "in_proj.bias": 0.1 * rng.standard_normal(H)}
    for n in range(2 * LEVELS):
        weights[f"network.{n}.weight"] = rng.standard_normal((H, H, W)) * (H * W) ** -0.5
        weights[f"network.{n}.bias"] = 0.1 * rng.standard_normal(H)
    weights |= {"out_proj.weight": rng.standard_normal((D, H)) * H**-0.5, "out_proj.bias": 0.1 * rng.standard_normal(D)}
    x = rng.standard_normal((B, T, D))
    return {"x": x, "y": network(x, weights), **weights}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("tcn.npz"), **make())
