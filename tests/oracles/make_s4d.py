"""Makes s4d.npz: S4D by the kernel of listing 1 of arXiv:2206.11893 and an FFT convolution, in numpy and float64.

python tests/oracles/make_s4d.py
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

B, L, H, N = 2, 50, 6, 4  # N modes, that is d_state 8


def kernel(log_dt, log_A_real, A_imag, C):
    """Two lines of the paper: discretise, then a Vandermonde product. (H L)"""
    A = -np.exp(log_A_real) + 1j * A_imag
    dtA = np.exp(log_dt)[:, None] * A
    C = (C[..., 0] + 1j * C[..., 1]) * (np.exp(dtA) - 1) / A
    return 2 * np.einsum("hn,hnl->hl", C, np.exp(dtA[..., None] * np.arange(L))).real


def layer(x, log_dt, log_A_real, A_imag, C, D, weight, bias):
    """Convolution, skip, GELU, and a linear map gated by its second half."""
    spectrum = np.fft.rfft(x.swapaxes(1, 2), 2 * L) * np.fft.rfft(kernel(log_dt, log_A_real, A_imag, C), 2 * L)
    y = np.fft.irfft(spectrum, 2 * L)[..., :L].swapaxes(1, 2) + D * x
    y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    value, gate = np.split(y @ weight.T + bias, 2, -1)
    return value / (1 + np.exp(-gate))


def make():
    rng = np.random.default_rng(0)
    weights = {
        "log_dt": rng.uniform(math.log(0.01), math.log(0.3), H),
        "log_A_real": np.log(0.5) + 0.1 * rng.standard_normal((H, N)),
        "A_imag": np.pi * np.arange(N) + 0.1 * rng.standard_normal((H, N)),
        "C": rng.standard_normal((H, N, 2)),
        "D": rng.standard_normal(H),
        "out_proj.weight": rng.standard_normal((2 * H, H)) * H**-0.5,
        "out_proj.bias": 0.1 * rng.standard_normal(2 * H),
    }
    x = rng.standard_normal((B, L, H))
    return {"x": x, "y": layer(x, *weights.values()), **weights}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("s4d.npz"), **make())
