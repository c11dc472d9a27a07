r"""Temporal convolution network: levels of dilated causal convolutions whose reach doubles from level to level.

    c_t = relu(b + sum_{i<W} M_i x_{t - i 2^level})      d_t = relu(b' + sum_{i<W} M'_i c_{t - i 2^level})
    x'_t = relu(x_t + d_t)                                 y_t = W_out x'_t after the last level

It sees 1 + 2 (W - 1) (2^n_levels - 1) tokens and nothing before them; each convolution keeps its last (W - 1) 2^level
inputs. The paper's weight normalisation and dropout are left out. Where d_hidden differs from d_model a linear map
widens the input.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.errors import InputError
from slipstream.core.mixer import Mixer, Mode
from slipstream.core.state import Slot, State
from slipstream.layers.linear import Linear
from slipstream.ops.causal_conv import dilated_conv, dilated_conv_flops
from slipstream.ops.causal_conv import reference as conv_reference


class TCN(Mixer, name="tcn", family="conv"):
    paper = "Bai, Kolter & Koltun 2018, arXiv:1803.01271, section 3 and figure 1"
    use_when = "sensor and other short-range series where a known, bounded stretch of the past decides"
    writes, erases = "x, beside its last inputs", "nothing"
    decays, reads = "what leaves the reach, all at once", "learned taps at distances 1, 2, 4, ..."
    symbols = {"k": "conv_size", "d": "dilation = 2^level", "n": "n_levels"}
    oracle = "golden arrays of a loop in numpy, tests/oracles/test_ssm_rnn_oracles.py"

    class Config(MixerConfig):
        d_hidden: int | None = None  # channels of every level; default d_model
        n_levels: int = 4  # levels of two convolutions; each doubles the dilation
        conv_size: int = 3  # taps of a convolution

    config: Config
    tiny = Config(d_model=16, d_hidden=8, n_levels=2, conv_size=3)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.n_levels < 1 or config.conv_size < 2:
            raise InputError(f"tcn takes n_levels >= 1, conv_size >= 2; got {config.n_levels} and {config.conv_size}")
        self.d_hidden = config.d_hidden or config.d_model
        same = self.d_hidden == config.d_model
        self.in_proj = nn.Identity() if same else Linear(config.d_model, self.d_hidden)
        dilations = [2**level for level in range(config.n_levels) for _ in range(2)]
        self.network = nn.ModuleList(CausalConv(self.d_hidden, config.conv_size, d) for d in dilations)
        self.out_proj = Linear(self.d_hidden, config.d_model)

    def _convs(self) -> dict[str, CausalConv]:
        """Two a level, under the names of their slots."""
        return {f"conv{i}": conv for i, conv in enumerate(self.network) if isinstance(conv, CausalConv)}

    def slots(self) -> dict[str, Slot]:
        return {name: conv.slot() for name, conv in self._convs().items()}

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        h = c = self.in_proj(x)
        lines = {}
        for i, (name, conv) in enumerate(self._convs().items()):
            c, lines[name] = conv(c, state[name], lengths)
            if i % 2:
                h = c = F.relu(h + c)
        return self.out_proj(h), state.advance(x.shape[1] if lengths is None else lengths, **lines)

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        x = self.in_proj(x)
        convs = list(self._convs().values())
        for first, second in zip(convs[::2], convs[1::2]):
            x = F.relu(x + second.reference(first.reference(x)))
        return self.out_proj(x)

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        one = dilated_conv_flops(B if mode == "step" else B * T, self.d_hidden, self.d_hidden, self.config.conv_size)
        return len(self.network) * one


class CausalConv(nn.Conv1d):
    """Dilated causal convolution with ReLU. The state is its last (W-1) * dilation inputs."""

    def __init__(self, width: int, conv_size: int, dilation: int) -> None:
        super().__init__(width, width, conv_size, dilation=dilation)

    def slot(self) -> Slot:
        return Slot(((self.kernel_size[0] - 1) * self.dilation[0], self.in_channels), dtype=None)

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "B T D"], state: Float[Tensor, "B P D"], lengths: Int[Tensor, "B"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B P D"]]:
        y, state = dilated_conv(x, self.weight, self.bias, state, lengths, self.dilation[0])
        return F.relu(y), state

    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return F.relu(conv_reference(x, self.weight, self.bias, self.dilation[0]))
