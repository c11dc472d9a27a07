r"""HiPPO-LegS: the state matrix that keeps the coefficients of the past in Legendre polynomials, as a start for training.

    A = V (diag(Lam) - P P^*) V^*        Lam_n = -1/2 + i w_n

Gu et al. 2021, arXiv:2111.00396, appendix B: A plus a matrix of rank one is normal, so that V is unitary. A itself must not
be diagonalised: its eigenvectors grow as 2^N. Eigenvalues come in conjugate pairs, of which one half, w_n > 0, is kept;
what belongs to the other half is the conjugate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from slipstream.core.errors import InputError


class Modes(NamedTuple):
    """Half of a normal-plus-low-rank matrix, in float64: n = N / 2 modes with rising frequencies."""

    Lam: Complex[Tensor, "n"]
    P: Complex[Tensor, "n"]
    B: Complex[Tensor, "n"]
    V: Complex[Tensor, "N n"]


def legs(N: int) -> tuple[Float[Tensor, "N N"], Float[Tensor, "N"], Float[Tensor, "N"]]:
    """A, its low-rank factor P (A + P P^T is normal) and B."""
    n = torch.arange(N, dtype=torch.float64)
    B = (2 * n + 1).sqrt()
    return torch.diag(n) - torch.outer(B, B).tril(), (n + 0.5).sqrt(), B


def hippo_modes(N: int) -> Modes:
    """HiPPO-LegS of N real dimensions. Raises InputError unless they come in pairs."""
    if N < 2 or N % 2:
        raise InputError(
            f"d_state {N} (in each block): modes come in pairs; take an even number, such as {max(2, N + 1)}"
        )
    A, P, B = legs(N)
    normal = A + torch.outer(P, P)
    w, V = torch.linalg.eigh(-1j * (normal + 0.5 * torch.eye(N)).to(torch.complex128))
    half = V[:, N // 2 :]
    return Modes(torch.complex(torch.full_like(w, -0.5), w)[N // 2 :], half.mH @ P.to(V), half.mH @ B.to(V), half)
