r"""The time-invariant recurrence of a linear state space whose matrix is not diagonal: one dense matrix a channel.

    h_t = A h_{t-1} + B x_t          y_t = C . h_t          h, B, C (D N), A (D N N), real

Worked chunk by chunk as lti_scan: inside a chunk a Toeplitz product with the kernel C A^j B, from chunk to chunk the state by
A to the chunk's length. Powers come by squaring, so A must be a contraction in the basis it is given in. This is for
matrices that no well-conditioned basis makes diagonal (HiPPO-LegS of S4); for all others lti_scan is faster by far.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.ops.chunks import chunk_length, n_chunks
from slipstream.ops.dispatch import operator
from slipstream.ops.lti_scan import toeplitz
from slipstream.ops.valid import zero_padding


@operator("x")
def dense_lti_scan(
    x: Float[Tensor, "B T D"],
    A: Float[Tensor, "D N N"],
    B: Float[Tensor, "D N"],
    C: Float[Tensor, "D N"],
    state: Float[Tensor, "B D N"] | None = None,
    lengths: Int[Tensor, "B"] | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D N"]]:
    """y in x's dtype and the last state, float32 at least."""
    (rows, T), wide = x.shape[:2], torch.promote_types(torch.promote_types(x.dtype, A.dtype), torch.float32)
    start = x.new_zeros(rows, *B.shape, dtype=wide) if state is None else state.to(wide)
    if T == 0:
        return x, start
    size = chunk_length(T, chunk_size)
    squares, reach, read = _powers(A.to(wide), B.to(wide), C.to(wide), size)
    write = reach.flip(-1)
    line = F.pad(zero_padding(x, lengths).to(wide), (0, 0, 0, -T % size))
    u = line.unflatten(1, (-1, size)).permute(3, 2, 1, 0)  # (D C M B): M chunks in each of B rows
    entering = _pass_on(squares[-1], (write @ u.flatten(2)).unflatten(2, u.shape[2:]), start.permute(1, 2, 0))
    kernel = (C.to(wide)[..., None] * reach).sum(1)
    y = torch.baddbmm(toeplitz(kernel) @ u.flatten(2), read, entering[:, :, :-1].flatten(2))
    ends = torch.full((rows,), T, device=x.device) if lengths is None else lengths
    y = y.unflatten(2, u.shape[2:]).permute(3, 2, 1, 0).flatten(1, 2)[:, :T]
    return y.to(x.dtype), _at_ends(line, entering, write, squares, ends)


def _powers(A: Tensor, B: Tensor, C: Tensor, size: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """A^1, A^2, A^4, ..., A^size; A^j B for j < size (D N C); C A^(j+1) for j < size (D C N)."""
    squares, reach, read = [A], B[..., None], C[:, None] @ A
    while reach.shape[-1] < size:
        reach = torch.cat([reach, squares[-1] @ reach], -1)
        read = torch.cat([read, read @ squares[-1]], 1)
        squares.append(squares[-1] @ squares[-1])
    return squares, reach, read


def _pass_on(power: Tensor, written: Float[Tensor, "D N M B"], h: Float[Tensor, "D N B"]) -> Float[Tensor, "D N M+1 B"]:
    """The states that enter each chunk, and the one that leaves the last."""
    states = [h]
    for w in written.unbind(2):
        h = torch.baddbmm(w, power, h)
        states.append(h)
    return torch.stack(states, 2)


def _at_ends(line: Tensor, entering: Tensor, write: Tensor, squares: list[Tensor], ends: Tensor) -> Tensor:
    """Each row's state after its own last token: its last whole chunk's, and the tokens since, set at a chunk's end."""
    size, rows = write.shape[2], torch.arange(len(ends), device=ends.device)
    since, place = ends % size, torch.arange(size, device=ends.device)
    index = (ends[:, None] - size + place).clamp(min=0)
    tail = torch.where((place >= size - since[:, None])[..., None], line[rows[:, None], index], 0.0)
    h = entering[:, :, ends // size, rows]
    for bit, power in enumerate(squares[:-1]):
        h = torch.where((since >> bit & 1).bool(), power @ h, h)
    return (h + write @ tail.permute(2, 1, 0)).permute(2, 0, 1)


def dense_lti_flops(tokens: int, rows: int, width: int, d_state: int, chunk_size: int) -> float:
    """Flops of the matrix products of so many tokens in each of so many rows, and of the powers all rows share."""
    C, N = chunk_length(tokens, chunk_size), d_state
    chunks, squarings = rows * n_chunks(tokens, chunk_size), C.bit_length() - 1
    powers = 2 * N * N + 4 * N * N * (C - 1) + 2 * N**3 * squarings
    ends = rows * (2 * N * N * squarings + 2 * N * C)
    return float(width * (powers + chunks * (2 * C * C + 4 * C * N + 2 * N * N) + ends))


def reference(
    x: Float[Tensor, "B T D"],
    A: Float[Tensor, "D N N"],
    B: Float[Tensor, "D N"],
    C: Float[Tensor, "D N"],
    state: Float[Tensor, "B D N"],
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D N"]]:
    """The equation, token by token."""
    ys = []
    for t in range(x.shape[1]):
        state = torch.einsum("dij,bdj->bdi", A, state) + B * x[:, t, :, None]
        ys.append(torch.einsum("dn,bdn->bd", C, state))
    return (torch.stack(ys, 1) if ys else x), state
