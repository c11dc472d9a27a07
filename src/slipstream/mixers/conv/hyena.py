r"""Hyena: long convolutions, each with a filter that a small network draws, between gates that are read from the input.

    x_0, ..., x_{N-1}, v = conv(W_in u)                                 (N = order; a short convolution)
    u = v * x_{N-n}       v <- h_n (*) u + skip_n * u       for n = 1, ..., N-1    ((*): convolved with all of the past)
    y = W_out (v * x_0)
    h_n(t) = exp(-delta t / horizon) MLP(t / horizon, cos(2 pi f t / horizon), -sin(2 pi f t / horizon))

The filters are functions of a position, not tables: any length is defined, and beyond `horizon` the window goes on falling.
The network has sines for activations and, as in the authors' code, one vector of frequencies for all its layers; their
positional features are trained too, with a table of a fixed length: here they stay what they start as.
There is no recurrence behind a filter, so every input is kept, one token reads them all, and a step draws the filter anew.
The feature t counts to horizon - 1, and the decay rates delta run evenly over the channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.short_conv import ShortConv
from slipstream.ops.attention import write_cache
from slipstream.ops.long_conv import long_conv, long_conv_flops, long_conv_step
from slipstream.ops.long_conv import reference as convolution_reference
from slipstream.ops.valid import zero_padding

Convolve = Callable[[int, Tensor], Tensor]  # number of the convolution, its inputs -> its outputs


class Hyena(Mixer, name="hyena", family="conv"):
    paper = "Poli et al. 2023, arXiv:2302.10866, section 3; filter network and window: the authors' code (safari)"
    use_when = (
        "long genomes or texts read whole, where training must be cheaper than attention and decoding need not be"
    )
    writes, erases = "u, kept as it is", "nothing"
    decays, reads = "exp(-delta t / horizon), by distance t", "h_n (*) u"
    train_order = "T log T"
    decode_order = "T"
    symbols = {"N": "order", "D": "d_model", "L": "horizon", "z": "v"}
    oracle = "numpy double loop with the authors' filter, tests/oracles/make_state_space.py, state_space.npz"
    no_weight_decay = ("skip", "frequency", "first", "first_bias", "inner", "inner_bias", "last")

    class Config(MixerConfig):
        order: int = 2  # gates; there is one long convolution less
        conv_size: int = 3  # width of the short convolution
        filter_width: int = 64  # width of the network that draws the filters
        filter_depth: int = 2  # its inner layers
        n_bands: int = 16  # frequencies of its positional features
        sine: float = 14.0  # what its activations' frequencies start at
        horizon: int = 1024  # length to which window and positional features are scaled; no limit
        fast_decay: float = 0.3  # share of the horizon in which the fastest channel's window falls to 1/100
        slow_decay: float = 1.5  # the same of the slowest channel

    config: Config
    tiny = Config(d_model=16, order=3, filter_width=5, filter_depth=1, n_bands=3, sine=2.0, horizon=12)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.order < 2:
            raise InputError(f"order {config.order} has no long convolution; take 2 or more")
        D = config.d_model
        self.in_proj = nn.Linear(D, (config.order + 1) * D)
        self.conv1d = ShortConv((config.order + 1) * D, config.conv_size, bias=True, activation=False)
        self.filter = ImplicitFilter(config)
        self.skip = nn.Parameter(torch.randn(config.order - 1, D))
        self.out_proj = nn.Linear(D, D)

    def slots(self) -> dict[str, Slot]:
        line = Slot((0, self.config.d_model), dtype=None, grows=True)
        return {**{f"u_{n}": line for n in range(self.config.order - 1)}, "conv": self.conv1d.slot()}

    def _from_fresh(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Training needs no history, and one transform of the whole is cheaper than many of pieces."""
        parts, _ = self.conv1d(self.in_proj(x), self.init_state(len(x))["conv"], lengths)
        taps = self.filter(x.shape[1])
        return self._through(zero_padding(parts, lengths), lambda n, u: long_conv(u, taps[n]))

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        state = self.reserve(state, x.shape[1])
        filled = (int(state.length.max()) if len(x) else 0) + x.shape[1]
        taps = self.filter(filled)

        def convolved(n: int, line: Tensor) -> Tensor:
            return long_conv(line[:, :filled], taps[n], state.length, x.shape[1])

        return self._on(x, state, lengths, convolved)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        """In a history that has room already: init_state(B, max_len), or reserve."""
        taps = self.filter(state["u_0"].shape[1])
        return self._on(x, state, None, lambda n, line: long_conv_step(line, taps[n], state.length)[:, None])

    def _on(self, x: Tensor, state: State, lengths: Tensor | None, convolved: Convolve) -> tuple[Tensor, State]:
        """Outputs and the new state; convolved(n, all inputs of convolution n so far) -> its outputs for these tokens."""
        parts, conv = self.conv1d(self.in_proj(x), state["conv"], lengths)
        lines: dict[str, Tensor] = {}

        def long(n: int, u: Tensor) -> Tensor:
            line = write_cache(state[f"u_{n}"][:, :, None], u[:, :, None], state.length, lengths)[:, :, 0]
            lines[f"u_{n}"] = line
            return convolved(n, line)

        y = self._through(zero_padding(parts, lengths), long)
        return y, state.advance(x.shape[1] if lengths is None else lengths, conv=conv, **lines)

    def _through(self, parts: Tensor, long: Convolve) -> Tensor:
        *gates, v = parts.chunk(self.config.order + 1, -1)
        for n, gate in enumerate(reversed(gates[1:])):
            u = v * gate
            v = torch.addcmul(long(n, u), self.skip[n], u)
        return self.out_proj(v * gates[0])

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        taps, parts = self.filter(x.shape[1]), self.conv1d.reference(self.in_proj(x))
        return self._through(parts, lambda n, u: convolution_reference(u, taps[n]))

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        D, convs = self.config.d_model, self.config.order - 1
        if mode == "step":
            return self.filter.flops(T + 1) + 2.0 * B * (T + 1) * D * convs
        return self.filter.flops(T) + convs * long_conv_flops(T, B, D)


class ImplicitFilter(nn.Module):
    """(convolutions, length, D) taps: a network of sines on positions, times a falling window. In float32 at least.

    Its matrices are parameters and no nn.Linear, for it is run once a sequence, not once a token and row.
    """

    def __init__(self, config: Hyena.Config) -> None:
        super().__init__()
        self.config, W, d_in = config, config.filter_width, 2 * config.n_bands + 1

        def uniform(*shape: int, fan_in: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5))

        self.first, self.first_bias = uniform(W, d_in, fan_in=d_in), uniform(W, fan_in=d_in)
        self.inner = uniform(config.filter_depth, W, W, fan_in=W)
        self.inner_bias = uniform(config.filter_depth, W, fan_in=W)
        self.last = uniform((config.order - 1) * config.d_model, W, fan_in=W)
        self.frequency = nn.Parameter(torch.full((W,), config.sine))

    def forward(self, length: int) -> Float[Tensor, "N L D"]:
        c, wide = self.config, torch.promote_types(self.first.dtype, torch.float32)
        position = torch.arange(length, dtype=wide, device=self.first.device)[:, None]
        bands = torch.linspace(1e-4, c.n_bands - 1, c.n_bands, dtype=wide, device=position.device)
        angle, t = 2 * math.pi / c.horizon * position * bands, position / (c.horizon - 1)
        z, frequency = torch.cat([t, angle.cos(), -angle.sin()], -1), self.frequency.to(wide)
        z = torch.sin(frequency * F.linear(z, self.first.to(wide), self.first_bias.to(wide)))
        for weight, bias in zip(self.inner.to(wide), self.inner_bias.to(wide)):
            z = torch.sin(frequency * F.linear(z, weight, bias))
        h = F.linear(z, self.last.to(wide))
        rates = math.log(100) * torch.linspace(
            1 / c.slow_decay, 1 / c.fast_decay, len(self.last), dtype=wide, device=h.device
        )
        return (h * torch.exp(-t * rates)).unflatten(-1, (-1, c.d_model)).transpose(0, 1)

    def flops(self, length: int) -> float:
        """Of its matrix products, for so many positions."""
        return 2.0 * length * (self.first.numel() + self.inner.numel() + self.last.numel())
