"""The stack: blocks from a pattern, a last norm. Knows nothing of tokens, so that any frontend and any head fit it."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.mixer import Mixer
from slipstream.core.registry import build
from slipstream.core.state import State
from slipstream.layers.norm import RMSNorm
from slipstream.models.block import Block
from slipstream.models.pattern import BlockSpec

RESIDUAL_OUTPUTS = ("o_proj", "out_proj", "down_proj")  # what writes to the residual stream, in every family


class Stack(nn.Module):
    """h (B T D) -> h (B T D); its state is its mixers' states under `<block>.<mixer>.<slot>`."""

    def __init__(self, specs: list[BlockSpec], d_model: int, defaults: dict[str, dict], eps: float = 1e-6) -> None:
        """defaults: settings by mixer name that the pattern's own settings override."""
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(
                [build(p.name, {"d_model": d_model, **defaults.get(p.name, {}), **p.settings}) for p in spec.parts],
                d_model,
                eps,
            )
            for spec in specs
        )
        self.norm = RMSNorm(d_model, eps)
        self._scale_residual_outputs()

    def _scale_residual_outputs(self) -> None:
        """Each write to the residual stream by 1/sqrt(number of writes), so that its size does not grow with depth (GPT-2)."""
        writes = sum(len(b.mixers) for b in self.blocks)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in RESIDUAL_OUTPUTS:
                module.weight.data.mul_(writes**-0.5)

    def mixers(self) -> list[Mixer]:
        return [m for b in self.blocks for m in b.mixers]

    def forward(self, h: Float[Tensor, "B T D"], packed: Int[Tensor, "N"] | None = None) -> Float[Tensor, "B T D"]:
        for block in self.blocks:
            h = block(h, packed)
        return self.norm(h)

    def prefill(self, h: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        tokens = h.shape[1] if lengths is None else lengths
        new = {}
        for i, block in enumerate(self.blocks):
            h, new[str(i)] = block.prefill(h, state.scope(str(i)), lengths)
        return self.norm(h), State.join(new, state.length + tokens)

    def step(self, h: Float[Tensor, "B 1 D"], state: State):
        new = {}
        for i, block in enumerate(self.blocks):
            h, new[str(i)] = block.step(h, state.scope(str(i)))
        return self.norm(h), State.join(new, state.length + 1)

    def init_state(self, batch_size: int, max_len: int = 0) -> State:
        states = {str(i): b.init_state(batch_size, max_len) for i, b in enumerate(self.blocks)}
        return State.join(states, next(iter(states.values())).length)

    def reserve(self, state: State, tokens: int) -> State:
        return State.join(
            {str(i): b.reserve(state.scope(str(i)), tokens) for i, b in enumerate(self.blocks)}, state.length
        )
