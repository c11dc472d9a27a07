"""Makes s5.npz: the state space of s5-pytorch 0.2.1 (pip install s5-pytorch), on both halves of the conjugate pairs.

python tests/oracles/make_s5.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from s5.s5_model import S5SSM

T, D, N = 29, 6, 8  # n = N / 2 modes are stored, their conjugates follow from them


def both(half, axis=0):
    return torch.cat([half, half.conj()], axis)


def make():
    torch.manual_seed(0)
    A = torch.complex(-0.5 - 0.3 * torch.rand(N // 2), 3.0 * torch.randn(N // 2))
    B, C = (torch.randn(shape, dtype=torch.complex64) for shape in ((N // 2, D), (D, N // 2)))
    log_dt, D_, x = -1.5 + 0.5 * torch.randn(N // 2), torch.randn(D), torch.randn(T, D)
    basis = torch.eye(N, dtype=torch.complex64)
    theirs = S5SSM(both(A), basis, basis, D, N, 0.001, 0.1, bcInit="dense")
    theirs.B.data, theirs.C.data = torch.view_as_real(both(B).resolve_conj()), both(C, 1).resolve_conj()
    theirs.D.data, theirs.log_step.data = D_, log_dt.repeat(2)
    with torch.no_grad():
        y, state = theirs(x, return_state=True)
    arrays = {"log_A_real": (-A.real).log(), "A_imag": A.imag, "B": torch.view_as_real(B), "C": torch.view_as_real(C)}
    arrays |= {"log_dt": log_dt, "D": D_, "x": x, "y": y, "state": state[: N // 2]}
    return {name: value.numpy() for name, value in arrays.items()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("s5.npz"), **make())
