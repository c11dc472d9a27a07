r"""Recurrences that pass the last hidden state through weights and a squash, RNN, LSTM and GRU: one token after another.

    rnn    h_t = tanh(W x_t + b + U h_{t-1} + b')
    lstm   i, f, o = sigmoid(.)   n = tanh(.)   of   W x_t + b + U h_{t-1} + b'
           c_t = f * c_{t-1} + i * n            h_t = o * tanh(c_t)
    gru    r, z = sigmoid(W x_t + b + U h_{t-1} + b')    n = tanh(W_n x_t + b_n + r * (U_n h_{t-1} + b'_n))
           h_t = (1 - z) * n + z * h_{t-1}

Weights are laid out as torch.nn.RNN's, torch.nn.LSTM's (gates i f n o) and torch.nn.GRU's (gates r z n), and torch's own
kernels run them: a loop in Python would be several times slower. The computation is in float32 at least, so that the state is too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from slipstream.ops.dispatch import operator
from slipstream.ops.valid import zero_padding

LSTMState = tuple[Float[Tensor, "B H"], Float[Tensor, "B H"]]


@operator("x")
def rnn_scan(
    x: Float[Tensor, "B T D"],
    weights: list[Tensor],
    state: Float[Tensor, "B H"],
    lengths: Int[Tensor, "B"] | None = None,
) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B H"]]:
    """All hidden states and the last. weights: W (H D), U (H H), b (H), b' (H)."""
    y, (h,) = _run(torch.rnn_tanh, x, weights, (state,), lengths)
    return y, h


@operator("x")
def lstm_scan(
    x: Float[Tensor, "B T D"],
    weights: list[Tensor],
    state: LSTMState,
    lengths: Int[Tensor, "B"] | None = None,
) -> tuple[Float[Tensor, "B T H"], LSTMState]:
    """All hidden states and the last (h, c). weights: W (4H D), U (4H H), b (4H), b' (4H)."""
    y, (h, c) = _run(torch.lstm, x, weights, state, lengths)
    return y, (h, c)


@operator("x")
def gru_scan(
    x: Float[Tensor, "B T D"],
    weights: list[Tensor],
    state: Float[Tensor, "B H"],
    lengths: Int[Tensor, "B"] | None = None,
) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B H"]]:
    """All hidden states and the last. weights: W (3H D), U (3H H), b (3H), b' (3H)."""
    y, (h,) = _run(torch.gru, x, weights, (state,), lengths)
    return y, h


def rnn_step(x: Float[Tensor, "B D"], weights: list[Tensor], state: Float[Tensor, "B H"]) -> Float[Tensor, "B H"]:
    """One token: the new h."""
    return torch.rnn_tanh_cell(x.to(state.dtype), state, *(w.to(state.dtype) for w in weights))


def lstm_step(x: Float[Tensor, "B D"], weights: list[Tensor], state: LSTMState) -> LSTMState:
    """One token: the new (h, c)."""
    wide = state[0].dtype
    return torch.lstm_cell(x.to(wide), state, *(w.to(wide) for w in weights))


def gru_step(x: Float[Tensor, "B D"], weights: list[Tensor], state: Float[Tensor, "B H"]) -> Float[Tensor, "B H"]:
    """One token: the new h."""
    return torch.gru_cell(x.to(state.dtype), state, *(w.to(state.dtype) for w in weights))


def nonlinear_scan_flops(tokens: int, n_gates: int, d_input: int, d_hidden: int) -> float:
    """Flops of the matrix products W x and U h of so many tokens."""
    return 2.0 * tokens * n_gates * d_hidden * (d_input + d_hidden)


def _run(
    kernel: Callable, x: Tensor, weights: list[Tensor], state: tuple[Tensor, ...], lengths: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    wide = torch.promote_types(x.dtype, torch.float32)
    weights, state = [w.to(wide) for w in weights], tuple(s.to(wide) for s in state)
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0], 0, state[0].shape[1]), state
    if lengths is not None:
        y, state = _ragged(kernel, zero_padding(x, lengths).to(wide), weights, state, lengths)
        return y.to(x.dtype), state
    y, *final = kernel(x.to(wide), _layer(state), weights, True, 1, 0.0, False, False, True)
    return y.to(x.dtype), tuple(s[0] for s in final)


def _ragged(kernel: Callable, x: Tensor, weights: list[Tensor], state: tuple[Tensor, ...], lengths: Tensor):
    """A row of length 0 is run for one token of zeros, whose state is then thrown away: torch packs no empty rows."""
    packed = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
    order = packed.sorted_indices
    start = _layer(tuple(s[order] for s in state))
    y, *final = kernel(packed.data, packed.batch_sizes, start, weights, True, 1, 0.0, False, False)
    rows = PackedSequence(y, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
    y, _ = pad_packed_sequence(rows, batch_first=True, total_length=x.shape[1])
    began = (lengths > 0)[:, None]
    return y, tuple(torch.where(began, f[0][packed.unsorted_indices], s) for f, s in zip(final, state))


def _layer(state: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """torch.lstm takes (h, c), the others h alone, each with a leading axis of layers."""
    return tuple(s[None] for s in state) if len(state) > 1 else state[0][None]


def rnn_reference(x: Float[Tensor, "B T D"], weights: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """The equation, token by token."""
    W, U, b, b2 = weights
    h, hs = state, []
    for t in range(x.shape[1]):
        h = torch.tanh(x[:, t] @ W.T + b + h @ U.T + b2)
        hs.append(h)
    return (torch.stack(hs, 1) if hs else x.new_zeros(x.shape[0], 0, h.shape[1])), h


def lstm_reference(x: Float[Tensor, "B T D"], weights: list[Tensor], state: LSTMState) -> tuple[Tensor, LSTMState]:
    """The equation, token by token."""
    W, U, b, b2 = weights
    (h, c), hs = state, []
    for t in range(x.shape[1]):
        i, f, n, o = torch.chunk(x[:, t] @ W.T + b + h @ U.T + b2, 4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(n)
        h = torch.sigmoid(o) * torch.tanh(c)
        hs.append(h)
    return (torch.stack(hs, 1) if hs else x.new_zeros(x.shape[0], 0, h.shape[1])), (h, c)


def gru_reference(x: Float[Tensor, "B T D"], weights: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """The equation, token by token."""
    W, U, b, b2 = weights
    h, hs = state, []
    for t in range(x.shape[1]):
        xr, xz, xn = torch.chunk(x[:, t] @ W.T + b, 3, -1)
        hr, hz, hn = torch.chunk(h @ U.T + b2, 3, -1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        h = (1 - z) * torch.tanh(xn + r * hn) + z * h
        hs.append(h)
    return (torch.stack(hs, 1) if hs else x.new_zeros(x.shape[0], 0, h.shape[1])), h
