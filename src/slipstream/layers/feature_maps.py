r"""Feature maps: positive vectors whose inner products stand in for the softmax kernel exp(q . k).

    elu_plus_one    phi(x) = elu(x) + 1                                                (Katharopoulos et al. 2020)
    log_favor       log phi_r(x) = w_r . x - |x|^2 / 2,  w_r orthogonal Gaussian rows  (FAVOR+, Choromanski et al. 2020)

log_favor gives logarithms, since the features themselves overflow: who uses them subtracts a maximum first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def elu_plus_one(x: Float[Tensor, "... K"]) -> Float[Tensor, "... K"]:
    """x + 1 where x > 0, exp(x) elsewhere."""
    return F.elu(x) + 1


def log_favor(x: Float[Tensor, "... K"], rows: Float[Tensor, "R K"]) -> Float[Tensor, "... R"]:
    """The mean of exp(log_favor(q) + log_favor(k)) over Gaussian rows is exp(q . k); the factor R^-1/2 is left out."""
    return x @ rows.T - x.square().sum(-1, keepdim=True) / 2


def orthogonal_gaussian_rows(n: int, width: int, seed: int) -> Float[Tensor, "R K"]:
    """n rows, orthogonal in blocks of `width`, with the lengths of Gaussian vectors; one seed, one set of rows."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(m: int) -> Tensor:
        return torch.randn(m, width, generator=generator, dtype=torch.float64)

    blocks = [torch.linalg.qr(gaussian(width))[0].T for _ in range(0, n, width)]
    return (torch.cat(blocks)[:n] * gaussian(n).norm(dim=1, keepdim=True)).float()
