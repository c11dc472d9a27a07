r"""A memory that is a small network, trained by gradient descent on the tokens as they are read.

    f(x; W) = LN(net(x; W)) + x        l_s(W) = |f(k_s; W) - v_s|^2 / 2        g_s = grad l_s at W_0
    o_t = f(q_t; W_t)

    averaged_sgd   W_t = W_0 - e_i sum_s lr_s g_s                    i = t mod M, s from the mini-batch's start to t
    momentum_sgd   Z_t = eta_t Z_{t-1} - lr_t g_t                    W_t = keep_t W_{t-1} + Z_t

W_0 are the weights with which the mini-batch of M tokens began, so that all its gradients are known at once; M is part of
the definition, and borders stand at multiples of M of each row's own position. net is linear layers with GELU between
(TTT, Sun et al. 2024, arXiv:2407.04620; Titans, Behrouz et al. 2024, arXiv:2501.00663, sec. 3.2).

In the dual form no W_t is ever made: a layer maps x_t to x_t W_0 + sum_s c_ts (x_t . X_s) D_s, X_s its inputs and D_s the
gradients at its outputs under l_s. These are written out, so that torch differentiates them like anything else. A state
holds what W_0 has moved since the start, and so is fresh at zero though the start is learned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from slipstream.core.mixer import Mode
from slipstream.ops.mini_batches import MiniBatches
from slipstream.ops.recompute import recomputed

SEGMENT = 16  # mini-batches computed between two states that are remembered for the gradient
FAINT = 1e-12  # a weight that small reads as nothing
Layers = tuple[Tensor, ...]  # one matrix a layer: (H I O) as parameters, (B H I O) in a state
Terms = list[tuple[Tensor | None, Layers]]  # matrices to read, each with a factor per token (B H M 1)
AveragedState = tuple[Layers, Layers]  # what W_0 has moved; the sum of lr g since
MomentumState = tuple[Layers, Layers, Layers]  # what W_0 has moved; W - W_0; Z


class Net(NamedTuple):
    """Where the inner network starts. With bias, the last row of every matrix meets a constant 1. eps: of LN."""

    weights: Layers
    norm_weight: Float[Tensor, "H K"]
    norm_bias: Float[Tensor, "H K"]
    bias: bool
    eps: float

    def from_start(self, moved: Layers) -> Layers:
        return tuple(w.to(m.dtype) + m for w, m in zip(self.weights, moved))

    def f(self, x: Float[Tensor, "*A H M K"], z: Float[Tensor, "*A H M K"]) -> Float[Tensor, "*A H M K"]:
        """LN(z) + x."""
        w, b = (p[:, None].to(z.dtype) for p in (self.norm_weight, self.norm_bias))
        return torch.addcmul(x + b, F.layer_norm(z, z.shape[-1:], eps=self.eps), w)


def averaged_sgd(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H K"],
    lr: Float[Tensor, "B T H"],
    pace: Float[Tensor, "M"],
    net: Net,
    state: AveragedState,
    position: Int[Tensor, "B"],
    lengths: Int[Tensor, "B"] | None = None,
) -> tuple[Float[Tensor, "B T H K"], AveragedState]:
    """Outputs in q's dtype, and the state after each row's last token. pace is e; position: tokens each row has seen."""
    batches = MiniBatches(position, q.shape[1], len(pace), lengths)
    wide = state[0][0].dtype
    rule = _Averaged(batches.by_head(lr.to(wide)), pace.to(wide), batches)
    return _over_batches(rule, batches, (q, k, v), net, state)


def momentum_sgd(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H K"],
    lr: Float[Tensor, "B T H"],
    log_momentum: Float[Tensor, "B T H"],
    log_keep: Float[Tensor, "B T H"],
    mini_batch: int,
    net: Net,
    state: MomentumState,
    position: Int[Tensor, "B"],
    lengths: Int[Tensor, "B"] | None = None,
) -> tuple[Float[Tensor, "B T H K"], MomentumState]:
    """The same with momentum; log_momentum = log eta and log_keep are <= 0."""
    batches = MiniBatches(position, q.shape[1], mini_batch, lengths)
    lr, log_momentum, log_keep = (batches.by_head(t.to(state[0][0].dtype)) for t in (lr, log_momentum, log_keep))
    coefficients = momentum_coefficients(lr, log_momentum, log_keep, batches.here[:, :, None])
    rule = _Momentum(coefficients, batches)
    return _over_batches(rule, batches, (q, k, v), net, state)


def _over_batches(rule: Any, batches: MiniBatches, qkv: tuple[Tensor, ...], net: Net, state: Any) -> tuple[Tensor, Any]:
    """From mini-batch to mini-batch, a segment of them at a time."""
    if qkv[0].shape[1] == 0:
        return qkv[0], state
    q, k, v = (batches.by_head(t.to(state[0][0].dtype)) for t in qkv)
    zs, moved, tokens = (
        [],
        state[0],
        [t.unbind(0) for t in (q, k, v - k)],
    )  # an index a time would cost N^2 in gradients
    state = (net.from_start(moved), *state[1:])
    for start in range(0, batches.n, SEGMENT):
        steps = range(start, min(start + SEGMENT, batches.n))
        z, state = recomputed(_segment, rule, steps, tokens, net, state)
        zs.append(z)
    moved = tuple(m + (w - w_0) for m, w, w_0 in zip(moved, state[0], net.from_start(moved)))
    return batches.in_order(net.f(q, torch.cat(zs))).to(qkv[0].dtype), (moved, *state[1:])


def _segment(rule: Any, steps: range, tokens: list[Layers], net: Net, state: Any) -> tuple[Tensor, Any]:
    """Here the first of state are the weights themselves."""
    zs, (q, k, target) = [], tokens
    for n in steps:
        X, D = _gradients(k[n], target[n], state[0], net)
        zs.append(_read(q[n], rule.terms(n, *state), rule.on_gradients[n], X, D, net.bias))
        state = rule.after(n, X, D, *state)
    return torch.stack(zs), state


def _read(x: Tensor, terms: Terms, c: Float[Tensor, "B H M M"], X: Layers, D: Layers, bias: bool) -> Tensor:
    """net(x_t; W_t) of every token, W_t being the terms and the gradients X_s^T D_s by c_ts."""
    z = x
    for layer, (inputs, slopes) in enumerate(zip(X, D)):
        x = _input(z, layer, bias)
        z = (c * (x @ inputs.mT)) @ slopes
        for factor, matrices in terms:
            read = x @ matrices[layer]
            z = z + (read if factor is None else factor * read)
    return z


def _input(z: Tensor, layer: int, bias: bool) -> Tensor:
    """What a layer gets: GELU of what the one before gave, and a 1 for the bias."""
    x = F.gelu(z, approximate="tanh") if layer else z
    return F.pad(x, (0, 1), value=1.0) if bias else x


def _forward(x: Tensor, W: Layers, bias: bool) -> tuple[Layers, Layers]:
    """Each layer's input and output."""
    inputs, outputs = [], [x]
    for layer, weight in enumerate(W):
        inputs.append(_input(outputs[-1], layer, bias))
        outputs.append(inputs[-1] @ weight)
    return tuple(inputs), tuple(outputs[1:])


def _gradients(k: Tensor, target: Tensor, W: Layers, net: Net) -> tuple[Layers, Layers]:
    """X and D: the gradient of l_s in a layer's matrix is X_s^T D_s."""
    X, Z = _forward(k, W, net.bias)
    D = [_loss_slope(Z[-1], target, net)]
    for weight, z in zip(W[:0:-1], Z[-2::-1]):
        D.append((D[-1] @ weight[..., : weight.shape[-2] - net.bias, :].mT) * _gelu_slope(z))
    return X, tuple(D[::-1])


def _loss_slope(z: Tensor, target: Tensor, net: Net) -> Tensor:
    """d/dz of |LN(z) - target|^2 / 2."""
    w, b = (p[:, None].to(z.dtype) for p in (net.norm_weight, net.norm_bias))
    normal = F.layer_norm(z, z.shape[-1:], eps=net.eps)
    g = w * (torch.addcmul(b, w, normal) - target)
    g = g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True)
    return g * torch.rsqrt(z.var(-1, unbiased=False, keepdim=True) + net.eps)


def _gelu_slope(z: Tensor) -> Tensor:
    """The derivative of GELU in its tanh form."""
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(scale * (z + cubic * z**3))
    return 0.5 * (1 + t) + 0.5 * scale * z * (1 - t * t) * (1 + 3 * cubic * z * z)


class _Averaged:
    """What TTT does with the gradients of a mini-batch."""

    def __init__(self, lr: Float[Tensor, "N B H M"], pace: Float[Tensor, "M"], at: MiniBatches) -> None:
        self.lr, self.pace, self.full, self.plain = (
            lr[..., None].unbind(0),
            pace,
            at.full[..., None, None, None],
            at.plain,
        )
        self.on_gradients = (-pace[:, None] * lr[..., None, :]).tril().unbind(0)

    def terms(self, n: int, W: Layers, sums: Layers) -> Terms:
        """Only the first mini-batch of a call can have gradients from before it."""
        return [(None, W), (-self.pace[:, None], sums)] if n == 0 else [(None, W)]

    def after(self, n: int, X: Layers, D: Layers, W: Layers, sums: Layers) -> AveragedState:
        own = [(self.lr[n] * x).mT @ d for x, d in zip(X, D)]
        if self.plain[n]:
            return tuple(torch.addcmul(w, g, self.pace[-1], value=-1) for w, g in zip(W, own)), sums
        return _averaged_end(W, [s + g for s, g in zip(sums, own)], self.pace[-1], self.full[n])


def _averaged_end(W: Layers, sums: list[Tensor], pace: Tensor, full: Tensor) -> AveragedState:
    """The mini-batch's step, where it is complete. W: the weights, or what they have moved."""
    W = tuple(torch.where(full, w - pace * s, w) for w, s in zip(W, sums))
    return W, tuple(s.masked_fill(full, 0.0) for s in sums)


class _Momentum:
    """What Titans does with them."""

    def __init__(self, coefficients: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], at: MiniBatches) -> None:
        on_start, on_momentum, on_gradients, left, put = coefficients
        self.on_start, self.on_momentum = on_start[..., None].unbind(0), on_momentum[..., None].unbind(0)
        self.on_gradients = on_gradients.unbind(0)
        rows = at.last[:, :, None].expand(on_start.shape[:3])[..., None]  # the last token's coefficients make the state
        kept = (t.gather(-1, rows)[..., None] for t in (on_start, on_momentum, left))
        line = rows[..., None].expand(*rows.shape, on_gradients.shape[-1])
        mixed = (t.gather(-2, line).mT for t in (on_gradients, put))
        self.keep, self.carry, self.left, self.write, self.put = (t.unbind(0) for t in (*kept, *mixed))
        self.some, self.full = (b[..., None, None, None] for b in (at.here.any(-1), at.full))
        self.plain = at.plain

    def terms(self, n: int, W: Layers, ahead: Layers, Z: Layers) -> Terms:
        rest: Terms = [(self.on_start[n], W), (self.on_momentum[n], Z)]
        return [*rest, (self.on_start[n], ahead)] if n == 0 else rest

    def after(self, n: int, X: Layers, D: Layers, W: Layers, ahead: Layers, Z: Layers) -> MomentumState:
        now = [torch.addcmul((self.write[n] * x).mT @ d, self.carry[n], z) for x, d, z in zip(X, D, Z)]
        later = [torch.addcmul((self.put[n] * x).mT @ d, self.left[n], z) for x, d, z in zip(X, D, Z)]
        if self.plain[n]:
            return _faded(torch.addcmul(m, self.keep[n], w) for m, w in zip(now, W)), ahead, _faded(later)
        now = [torch.addcmul(m, self.keep[n], w + a) for m, w, a in zip(now, W, ahead)]
        gone = [torch.where(self.some[n], m - w, a) for m, w, a in zip(now, W, ahead)]
        return _momentum_end(W, gone, [torch.where(self.some[n], m, z) for m, z in zip(later, Z)], self.full[n])


def _faded(layers: Iterable[Tensor]) -> Layers:
    """A memory that is almost forgotten is forgotten: products of its remains would be subnormal, and ten times as slow."""
    return tuple(F.hardshrink(w, FAINT) for w in layers)


def _momentum_end(W: Layers, ahead: list[Tensor], Z: list[Tensor], full: Tensor) -> MomentumState:
    W = tuple(torch.where(full, w + a, w) for w, a in zip(W, ahead))
    return W, tuple(a.masked_fill(full, 0.0) for a in ahead), tuple(Z)


def momentum_coefficients(
    lr: Float[Tensor, "*A M"],
    log_momentum: Float[Tensor, "*A M"],
    log_keep: Float[Tensor, "*A M"],
    here: Bool[Tensor, "*C M"] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """W_t = on_start_t W + on_momentum_t Z + sum_s on_gradients_ts g_s, and Z_t = left_t Z + sum_s put_ts g_s.

    W and Z are those before the first token. Where not here, nothing happens (lr and the logarithms must be 0 there).
    """
    kept, since_keep = _products(log_keep)
    held, since_momentum = _products(log_momentum)
    if here is not None:
        kept = kept * here[..., None, :]  # Z is added where there is a token
    put = -held * lr[..., None, :]
    on_momentum = (kept @ since_momentum[..., None]).squeeze(-1)
    return since_keep, on_momentum, kept @ put, since_momentum, put


def _products(log: Float[Tensor, "*A M"]) -> tuple[Float[Tensor, "*A M M"], Float[Tensor, "*A M"]]:
    """Products over (s, t], zero above the diagonal, and over [1, t]. A difference of sums needs float64."""
    total = log.double().cumsum(-1)
    future = torch.ones(total.shape[-1:] * 2, dtype=torch.bool, device=log.device).triu(1)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(future, -torch.inf)
    return between.exp().to(log.dtype), total.exp().to(log.dtype)


def averaged_step(
    q: Float[Tensor, "B 1 H K"],
    k: Float[Tensor, "B 1 H K"],
    v: Float[Tensor, "B 1 H K"],
    lr: Float[Tensor, "B 1 H"],
    pace: Float[Tensor, "M"],
    net: Net,
    state: AveragedState,
    position: Int[Tensor, "B"],
) -> tuple[Float[Tensor, "B 1 H K"], AveragedState]:
    """One token of averaged_sgd, by the rule itself."""
    wide, place = state[0][0].dtype, position % len(pace)
    W, X, D = _one_gradient(k, v, net, state[0])
    rate, pace = lr[:, 0, :, None, None].to(wide), pace.to(wide)
    sums = [torch.addcmul(s, rate * x.mT, d) for s, x, d in zip(state[1], X, D)]
    now = tuple(w - pace[place, None, None, None] * s for w, s in zip(W, sums))
    full = (place == len(pace) - 1)[:, None, None, None]
    return _one_output(q, now, net), _averaged_end(state[0], sums, pace[-1], full)


def momentum_step(
    q: Float[Tensor, "B 1 H K"],
    k: Float[Tensor, "B 1 H K"],
    v: Float[Tensor, "B 1 H K"],
    lr: Float[Tensor, "B 1 H"],
    log_momentum: Float[Tensor, "B 1 H"],
    log_keep: Float[Tensor, "B 1 H"],
    mini_batch: int,
    net: Net,
    state: MomentumState,
    position: Int[Tensor, "B"],
) -> tuple[Float[Tensor, "B 1 H K"], MomentumState]:
    """One token of momentum_sgd, by the rule itself."""
    W, X, D = _one_gradient(k, v, net, state[0])
    rate, eta, keep = (t[:, 0, :, None, None].to(W[0].dtype) for t in (lr, log_momentum.exp(), log_keep.exp()))
    Z = [torch.addcmul(eta * z, -rate * x.mT, d) for z, x, d in zip(state[2], X, D)]
    now = tuple(keep * (w + a) + z for w, a, z in zip(W, state[1], Z))
    ahead = [n - w for n, w in zip(now, W)]
    full = (position % mini_batch == mini_batch - 1)[:, None, None, None]
    return _one_output(q, now, net), _momentum_end(state[0], ahead, Z, full)


def _one_gradient(k: Tensor, v: Tensor, net: Net, moved: Layers) -> tuple[Layers, Layers, Layers]:
    W = net.from_start(moved)
    row, target = (t.transpose(1, 2).to(W[0].dtype) for t in (k, v - k))
    return W, *_gradients(row, target, W, net)


def _one_output(q: Tensor, W: Layers, net: Net) -> Float[Tensor, "B 1 H K"]:
    row = q.transpose(1, 2).to(W[0].dtype)
    return net.f(row, _forward(row, W, net.bias)[1][-1]).transpose(1, 2).to(q.dtype)


def inner_sgd_flops(
    T: int, B: int, H: int, shapes: list[tuple[int, int]], bias: bool, mini_batch: int, momentum: bool, mode: Mode
) -> float:
    """Flops of the matrix products over T tokens of rows without a past, or of one step. shapes: (I, O) of each matrix."""
    products = sum(i * o for i, o in shapes)
    back = sum((i - bias) * o for i, o in shapes[1:])
    if mode == "step":
        return 2.0 * B * H * (2 * products + back)
    M, N = mini_batch, -(-T // mini_batch)
    each = (5 if momentum else 3) * products + back + M * sum(i + o for i, o in shapes)
    rates = N * (M**3 + M**2) if momentum else 0
    return 2.0 * B * H * (M * (N * each + (products if N else 0)) + rates)


def averaged_reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H K"],
    lr: Float[Tensor, "B T H"],
    pace: Float[Tensor, "M"],
    net: Net,
) -> Float[Tensor, "B T H K"]:
    """Token by token from the start, every W_t made, the inner gradient by torch."""
    W_t, outs = [w.expand(len(q), *w.shape) for w in net.weights], []
    for t in range(q.shape[1]):
        i = t % len(pace)
        if i == 0:
            W_0, total = W_t, [torch.zeros_like(w) for w in W_t]
        g = _nabla(k[:, t], v[:, t], W_0, net)
        total = [s + lr[:, t, :, None, None] * g_l for s, g_l in zip(total, g)]
        W_t = [w - pace[i] * s for w, s in zip(W_0, total)]
        outs.append(_f(q[:, t], W_t, net))
    return torch.stack(outs, 1) if outs else q


def momentum_reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H K"],
    lr: Float[Tensor, "B T H"],
    log_momentum: Float[Tensor, "B T H"],
    log_keep: Float[Tensor, "B T H"],
    mini_batch: int,
    net: Net,
) -> Float[Tensor, "B T H K"]:
    """The same with momentum."""
    W_t, outs = [w.expand(len(q), *w.shape) for w in net.weights], []
    Z = [torch.zeros_like(w) for w in W_t]
    for t in range(q.shape[1]):
        if t % mini_batch == 0:
            W_0 = W_t
        rate, eta, keep = (r[:, t, :, None, None] for r in (lr, log_momentum.exp(), log_keep.exp()))
        Z = [eta * z - rate * g for z, g in zip(Z, _nabla(k[:, t], v[:, t], W_0, net))]
        W_t = [keep * w + z for w, z in zip(W_t, Z)]
        outs.append(_f(q[:, t], W_t, net))
    return torch.stack(outs, 1) if outs else q


def _nabla(k: Float[Tensor, "B H K"], v: Float[Tensor, "B H K"], W: list[Tensor], net: Net) -> tuple[Tensor, ...]:
    """grad_W |f(k; W) - v|^2 / 2."""
    with torch.enable_grad():
        at = [w if w.requires_grad else w.detach().requires_grad_() for w in W]
        return torch.autograd.grad((_f(k, at, net) - v).square().sum() / 2, at, create_graph=True)


def _f(x: Float[Tensor, "B H K"], W: list[Tensor], net: Net) -> Float[Tensor, "B H K"]:
    """LN(net(x; W)) + x."""
    z = x
    for layer, weight in enumerate(W):
        z = F.gelu(z, approximate="tanh") if layer else z
        rows, offset = (weight[..., :-1, :], weight[..., -1, :]) if net.bias else (weight, 0.0)
        z = torch.einsum("bhi,bhio->bho", z, rows) + offset
    normal = (z - z.mean(-1, keepdim=True)) / torch.sqrt(z.var(-1, unbiased=False, keepdim=True) + net.eps)
    return normal * net.norm_weight + net.norm_bias + x
