r"""The time-invariant diagonal recurrence of linear state spaces: every channel filters its input by N complex modes.

    h_t = exp(log_decay) * h_{t-1} + x_t          y_t = Re(sum_n weight_n h_{t,n})          h (D N) complex

Equal to a convolution with the kernel k_j = Re(sum_n weight_n exp(j log_decay_n)) (Gu et al. 2022, arXiv:2206.11893,
eq. 6 with the input matrix in weight). Worked chunk by chunk: inside a chunk a Toeplitz product with that kernel, from
chunk to chunk the state. So the work is linear in T, nothing of length T is transformed, and any state may enter.
Re(log_decay) must be <= 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int
from torch import Tensor

from slipstream.ops.dispatch import operator
from slipstream.ops.linear_scan import linear_scan
from slipstream.ops.valid import zero_padding


@operator("x")
def lti_scan(
    x: Float[Tensor, "B T D"],
    log_decay: Complex[Tensor, "D N"],
    weight: Complex[Tensor, "D N"],
    state: Complex[Tensor, "B D N"] | None = None,
    lengths: Int[Tensor, "B"] | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T D"], Complex[Tensor, "B D N"]]:
    """y in x's dtype and the last state, complex64 at least."""
    kind = torch.promote_types(torch.promote_types(x.dtype, log_decay.dtype), torch.complex64)
    (B, T, D), C = x.shape, max(1, min(chunk_size, x.shape[1]))
    start = x.new_zeros(B, *log_decay.shape, dtype=kind) if state is None else state.to(kind)
    if T == 0:
        return x, start
    log_decay, weight = log_decay.to(kind), weight.to(kind)
    powers = torch.exp(log_decay[..., None] * torch.arange(C + 1, device=x.device))
    line = F.pad(zero_padding(x, lengths).to(kind.to_real()), (0, 0, 0, -T % C))
    u = line.reshape(-1, C, D).permute(2, 1, 0).contiguous()  # (D C M): all M = B T/C chunks at once
    write = _parts(powers[..., :C].flip(-1), 1)
    h = _from_parts(write @ u).permute(2, 0, 1).unflatten(0, (B, -1))
    h, _ = linear_scan(powers[..., C].expand_as(h), h, start)
    entering = torch.cat([start[:, None], h], 1)
    y = toeplitz((weight[..., None] * powers[..., :C]).real.sum(1)) @ u
    read = _parts((weight[..., None] * powers[..., 1:]).conj(), 1)
    y = torch.baddbmm(y, read.mT, _parts(entering[:, :-1].flatten(0, 1).permute(1, 2, 0), 1))
    ends = torch.full((B,), T, device=x.device) if lengths is None else lengths
    y = y.permute(2, 1, 0).reshape(B, -1, D)[:, :T]
    return y.to(x.dtype), _at_ends(line, entering, write, log_decay, ends)


def lti_step(
    x: Float[Tensor, "B D"],
    log_decay: Complex[Tensor, "D N"],
    weight: Complex[Tensor, "D N"],
    state: Complex[Tensor, "B D N"],
) -> tuple[Float[Tensor, "B D"], Complex[Tensor, "B D N"]]:
    """One token."""
    state = torch.exp(log_decay) * state + x[..., None]
    return (weight * state).real.sum(-1).to(x.dtype), state


def zero_order_hold(
    A: Complex[Tensor, "*D N"], C: Complex[Tensor, "*D N"], dt: Float[Tensor, "*D 1"]
) -> tuple[Complex[Tensor, "*D N"], Complex[Tensor, "*D N"]]:
    """log_decay and weight of h' = A h + x, y = Re(C . h), where x is held for a time dt: dt A, and C (exp(dt A) - 1) / A."""
    log_decay = dt * A
    return log_decay, C * torch.expm1(log_decay) / A


def lti_scan_flops(tokens: int, rows: int, width: int, d_state: int, chunk_size: int) -> float:
    """Flops of the matrix products of so many tokens in each of so many rows; a complex mode is two real ones."""
    size = min(chunk_size, tokens)
    chunks = rows * -(-tokens // size)
    return 2.0 * width * size * (chunks * (size + 4 * d_state) + rows * 2 * d_state)


def _parts(z: Tensor, axis: int) -> Tensor:
    """Real over imaginary: complex products as real ones, at half the work where only the real part is wanted."""
    return torch.cat([z.real, z.imag], axis)


def _from_parts(parts: Tensor) -> Tensor:
    return torch.complex(*parts.chunk(2, 1))


def toeplitz(kernel: Float[Tensor, "D C"]) -> Float[Tensor, "D C C"]:
    """Row i, column j: kernel[i - j], zero above the diagonal."""
    C = kernel.shape[1]
    return F.pad(kernel, (C - 1, 0)).unfold(1, C, 1).flip(-1)


def _at_ends(line: Tensor, entering: Tensor, write: Tensor, log_decay: Tensor, ends: Tensor) -> Tensor:
    """Each row's state after its own last token: its last whole chunk's, and the tokens since, set at a chunk's end."""
    C, rows = write.shape[2], torch.arange(len(ends), device=ends.device)
    since = ends % C
    place = torch.arange(C, device=ends.device)
    index = (ends[:, None] - C + place).clamp(min=0)
    tail = torch.where((place >= C - since[:, None])[..., None], line[rows[:, None], index], 0.0)
    late = _from_parts(write @ tail.permute(2, 1, 0)).permute(2, 0, 1)
    return torch.exp(log_decay * since[:, None, None]) * entering[rows, ends // C] + late


def reference(
    x: Float[Tensor, "B T D"],
    log_decay: Complex[Tensor, "D N"],
    weight: Complex[Tensor, "D N"],
    state: Complex[Tensor, "B D N"],
) -> tuple[Float[Tensor, "B T D"], Complex[Tensor, "B D N"]]:
    """The equation, token by token."""
    ys = []
    for t in range(x.shape[1]):
        state = torch.exp(log_decay) * state + x[:, t, :, None]
        ys.append(torch.einsum("dn,bdn->bd", weight, state).real)
    return (torch.stack(ys, 1) if ys else x), state
