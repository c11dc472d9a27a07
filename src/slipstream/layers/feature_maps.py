r"""Feature maps: vectors whose inner products are weights, most of them standing in for the softmax kernel exp(q . k).

    elu_plus_one    phi(x) = elu(x) + 1                                                (Katharopoulos et al. 2020)
    log_favor       log phi_r(x) = w_r . x - |x|^2 / 2,  w_r orthogonal Gaussian rows  (FAVOR+, Choromanski et al. 2020)
    fourier         phi(x) = [sin(w_r . x), cos(w_r . x)] / sqrt(R)                    (RFA, Peng et al. 2021)
    cosine_fading   phi(x_t) = relu(x_t) times [cos(a_t), sin(a_t)]                    (cosFormer, Qin et al. 2022)
    pairs           phi(x) = all x_i x_j:  phi(q) . phi(k) = (q . k)^2                 (ReBased, Aksenov et al. 2024)
    taylor_exp      phi(x) = [1, x, pairs(x) / sqrt(2)]                                (Based, Arora et al. 2024)
    softmax_pair    phi(x) = [softmax(x), softmax(-x)]                                 (Hedgehog, Zhang et al. 2024)

log_favor gives logarithms, since the features themselves overflow: who uses them subtracts a maximum first.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def elu_plus_one(x: Float[Tensor, "... K"]) -> Float[Tensor, "... K"]:
    """x + 1 where x > 0, exp(x) elsewhere."""
    return F.elu(x) + 1


def log_favor(x: Float[Tensor, "... K"], rows: Float[Tensor, "R K"]) -> Float[Tensor, "... R"]:
    """The mean of exp(log_favor(q) + log_favor(k)) over Gaussian rows is exp(q . k); the factor R^-1/2 is left out."""
    return x @ rows.T - x.square().sum(-1, keepdim=True) / 2


def fourier(x: Float[Tensor, "B T H K"], rows: Float[Tensor, "H R K"]) -> Float[Tensor, "B T H R2"]:
    """The mean of fourier(q) . fourier(k) over Gaussian rows is exp(-|q - k|^2 / 2); it is exactly 1 where q = k."""
    angle = torch.einsum("bthk,hrk->bthr", x, rows)
    return torch.cat([angle.sin(), angle.cos()], -1) * rows.shape[1] ** -0.5


def cosine_fading(x: Float[Tensor, "B T H K"], positions: Int[Tensor, "B T"], reach: int) -> Float[Tensor, "B T H K2"]:
    """Products fade with the distance, as cos(pi / 2 * distance / reach); positions beyond `reach` all stand at it.

    No two angles are then further apart than a right angle, so that no weight is negative, however long the text.
    """
    angle = (math.pi / 2 / reach) * positions.clamp(max=reach).to(x.dtype)[..., None, None]
    x = F.relu(x)
    return torch.cat([x * angle.cos(), x * angle.sin()], -1)


def pairs(x: Float[Tensor, "... K"]) -> Float[Tensor, "... P"]:
    """x_i x_j for i <= j, times sqrt(2) where i < j, which stands for x_j x_i too: P = K (K + 1) / 2."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    twice = x.new_full(i.shape, math.sqrt(2)).masked_fill(i == j, 1.0)
    return x.index_select(-1, i) * x.index_select(-1, j) * twice


def taylor_exp(x: Float[Tensor, "... K"]) -> Float[Tensor, "... P"]:
    """Products are 1 + s + s^2 / 2 with s = q . k, which is at least 1/2: P = 1 + K + K (K + 1) / 2."""
    return torch.cat([torch.ones_like(x[..., :1]), x, pairs(x) / math.sqrt(2)], -1)


def softmax_pair(x: Float[Tensor, "... K"]) -> Float[Tensor, "... K2"]:
    """Large where x is far from the rest, in either direction."""
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)


def learned_pair(x: Float[Tensor, "B T H K"], weight: Float[Tensor, "H R K"]) -> Float[Tensor, "B T H R2"]:
    """The same after a learned matrix a head."""
    return softmax_pair(torch.einsum("bthk,hrk->bthr", x, weight.to(x.dtype)))


def orthogonal_gaussian_rows(n: int, width: int, seed: int) -> Float[Tensor, "R K"]:
    """n rows, orthogonal in blocks of `width`, with the lengths of Gaussian vectors; one seed, one set of rows."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(m: int) -> Tensor:
        return torch.randn(m, width, generator=generator, dtype=torch.float64)

    blocks = [torch.linalg.qr(gaussian(width))[0].T for _ in range(0, n, width)]
    return (torch.cat(blocks)[:n] * gaussian(n).norm(dim=1, keepdim=True)).float()
