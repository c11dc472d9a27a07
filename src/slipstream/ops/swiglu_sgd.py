r"""A memory that is a SwiGLU network, which takes one step of learning per large chunk of tokens.

    f(x; W) = (silu(x W_0) * (x W_2)) W_1        g = sum over the chunk of lr_t * grad_W (f(k_t; W) . v_t)
    o_t = f(q_t; W)                              G <- g + mean(momentum_t) G
    at a chunk's end, for each matrix:           W <- columns of (W + U) brought back to the lengths with which they began

U is G, or G with its singular values brought near 1 (Muon's Newton-Schulz iteration). Within a chunk W does not change:
tokens read what all earlier chunks wrote and nothing of their own (large-chunk test-time training, Zhang et al. 2025,
arXiv:2505.23884). Chunks end at multiples of M of each row's own position. Gradients are written out, so that torch
differentiates them. A state holds what W has moved since the start, and so is fresh at zero though the start is learned.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.mixer import Mode
from slipstream.ops.mini_batches import MiniBatches

Matrices = tuple[Tensor, Tensor, Tensor]  # W_0 (I O), W_1 (O I), W_2 (I O); by head, and by row in a state
EPS = 1e-5  # beside lengths, as in the authors' code
NEWTON_SCHULZ = [  # coefficients of x, x^3 and x^5, one row an iteration
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


class ChunkState(NamedTuple):
    """moved: of W, since the start; sums: g so far; momentum: G; gates: the sum of this chunk's momentum_t."""

    moved: Matrices
    sums: Matrices
    momentum: Matrices
    gates: Float[Tensor, "B H"]


def swiglu_sgd(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H K"],
    lr: Float[Tensor, "B T H 3"],
    momentum: Float[Tensor, "B T H"],
    start: Matrices,
    chunk: int,
    muon: bool,
    state: ChunkState,
    position: Int[Tensor, "B"],
    lengths: Int[Tensor, "B"] | None = None,
) -> tuple[Float[Tensor, "B T H K"], ChunkState]:
    """Outputs in q's dtype, and the state after each row's last token. position: tokens each row has seen."""
    if q.shape[1] == 0:
        return q, state
    wide, at, outs = state.gates.dtype, MiniBatches(position, q.shape[1], chunk, lengths), []
    lines = [at.by_head(t.to(wide)).unbind(0) for t in (q, k, v, lr, momentum)]
    some = at.full.any(-1).tolist()
    for n, (q_n, k_n, v_n, lr_n, gates) in enumerate(zip(*lines)):
        W = _weights(start, state)
        outs.append(_f(q_n, W))
        own = _gradients(k_n, v_n, lr_n, W)
        state = state._replace(sums=_plus(state.sums, own), gates=state.gates + gates.sum(-1))
        if some[n]:
            state = _end(start, state, chunk, muon, at.full[n])
    return at.in_order(torch.stack(outs)).to(q.dtype), state


def swiglu_step(
    q: Float[Tensor, "B 1 H K"],
    k: Float[Tensor, "B 1 H K"],
    v: Float[Tensor, "B 1 H K"],
    lr: Float[Tensor, "B 1 H 3"],
    momentum: Float[Tensor, "B 1 H"],
    start: Matrices,
    chunk: int,
    muon: bool,
    state: ChunkState,
    position: Int[Tensor, "B"],
) -> tuple[Float[Tensor, "B 1 H K"], ChunkState]:
    """One token of swiglu_sgd."""
    row, key, value, rate = (t.transpose(1, 2).to(state.gates.dtype) for t in (q, k, v, lr))
    W = _weights(start, state)
    sums = _plus(state.sums, _gradients(key, value, rate, W))
    state = state._replace(sums=sums, gates=state.gates + momentum[:, 0].to(state.gates.dtype))
    full = position % chunk == chunk - 1
    # A captured graph has no host to ask; anywhere else a chunk's end is not computed before it comes.
    if torch.compiler.is_compiling() or bool(full.any()):
        state = _end(start, state, chunk, muon, full)
    return _f(row, W).transpose(1, 2).to(q.dtype), state


def _weights(start: Matrices, state: ChunkState) -> Matrices:
    W_0, W_1, W_2 = (w.to(m.dtype) + m for w, m in zip(start, state.moved))
    return W_0, W_1, W_2


def _plus(a: Matrices, b: Matrices) -> Matrices:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def _f(x: Float[Tensor, "*A K"], W: Matrices) -> Float[Tensor, "*A K"]:
    return (F.silu(x @ W[0]) * (x @ W[2])) @ W[1]


def _gradients(k: Tensor, v: Tensor, lr: Float[Tensor, "B H M 3"], W: Matrices) -> Matrices:
    """sum_t lr_t grad (f(k_t; W) . v_t), matrix by matrix."""
    lr_0, lr_1, lr_2 = lr[..., None].unbind(-2)
    gate, up = k @ W[0], k @ W[2]
    sigma = torch.sigmoid(gate)
    act, back = gate * sigma, v @ W[1].mT
    slope = sigma * (1 + gate * (1 - sigma))
    g_0 = (lr_0 * k).mT @ (back * up * slope)
    g_1 = (lr_1 * act * up).mT @ v
    return g_0, g_1, (lr_2 * k).mT @ (back * act)


def _end(start: Matrices, state: ChunkState, chunk: int, muon: bool, full: Tensor) -> ChunkState:
    """The step of learning, in the rows whose chunk is full."""
    full = full[:, None, None, None]
    share = (state.gates / chunk)[..., None, None]
    parts = []
    for w, moved, g, G in zip(start, state.moved, state.sums, state.momentum):
        new = torch.addcmul(g, share, G)
        step = _learned(w.to(g.dtype), moved, orthogonalised(new) if muon else new)
        parts.append((torch.where(full, step, moved), g.masked_fill(full, 0.0), torch.where(full, new, G)))
    (a, b, c), (d, e, f), (g, h, i) = zip(*parts)
    return ChunkState((a, b, c), (d, e, f), (g, h, i), state.gates.masked_fill(full[..., 0, 0], 0.0))


def _learned(w: Float[Tensor, "H I O"], moved: Float[Tensor, "B H I O"], step: Tensor) -> Float[Tensor, "B H I O"]:
    """How far W stands from its start when it has taken the step and its columns are as long as at first."""
    new = w + moved + step
    length, first = (t.norm(dim=-2, keepdim=True) for t in (new, w))
    return new / (length + EPS) * first - w


def orthogonalised(G: Float[Tensor, "*A I O"]) -> Float[Tensor, "*A I O"]:
    """G = A S B^T becomes about A B^T: an odd polynomial of G, in the smaller of its two widths."""
    tall = G.shape[-2] > G.shape[-1]
    X = G.mT if tall else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


def swiglu_flops(T: int, B: int, H: int, K: int, hidden: int, chunk: int, muon: bool, mode: Mode) -> float:
    """Flops of the matrix products over T tokens of rows without a past; of one token inside a chunk (step)."""
    if mode == "step":
        return 2.0 * B * H * 9 * K * hidden
    small = min(K, hidden)
    end = 3 * len(NEWTON_SCHULZ) * (small**3 + 2 * small * K * hidden) if muon else 0
    return 2.0 * B * H * (-(-T // chunk) * chunk * 9 * K * hidden + T // chunk * end)


def reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H K"],
    lr: Float[Tensor, "B T H 3"],
    momentum: Float[Tensor, "B T H"],
    start: Matrices,
    chunk: int,
    muon: bool,
) -> Float[Tensor, "B T H K"]:
    """Token by token from the start; the inner gradient by torch."""
    W, outs = [w.expand(len(q), *w.shape) for w in start], []
    g, G, share = [torch.zeros_like(w) for w in W], [torch.zeros_like(w) for w in W], torch.zeros(())
    for t in range(q.shape[1]):
        outs.append(_one(q[:, t], W))
        with torch.enable_grad():
            at = [w if w.requires_grad else w.detach().requires_grad_() for w in W]
            nabla = torch.autograd.grad((_one(k[:, t], at) * v[:, t]).sum(), at, create_graph=True)
        g = [s + lr[:, t, :, i, None, None] * d for i, (s, d) in enumerate(zip(g, nabla))]
        share = share + momentum[:, t, :, None, None] / chunk
        if t % chunk == chunk - 1:
            G = [s + share * last for s, last in zip(g, G)]
            W = [w + (orthogonalised(u) if muon else u) for w, u in zip(W, G)]
            lengths = [
                (w.square().sum(-2, keepdim=True).sqrt(), s.square().sum(-2, keepdim=True).sqrt())
                for w, s in zip(W, start)
            ]
            W = [w / (now + EPS) * first for w, (now, first) in zip(W, lengths)]
            g, share = [torch.zeros_like(w) for w in W], torch.zeros(())
    return torch.stack(outs, 1) if outs else q


def _one(x: Float[Tensor, "B H K"], W: list[Tensor]) -> Float[Tensor, "B H K"]:
    gate, up = (torch.einsum("bhi,bhio->bho", x, w) for w in (W[0], W[2]))
    return torch.einsum("bho,bhoi->bhi", F.silu(gate) * up, W[1])
