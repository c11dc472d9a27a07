"""A block: mixers one after another, each normed before and added to the residual stream."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.mixer import Mixer
from slipstream.core.state import State
from slipstream.layers.norm import RMSNorm


class Block(nn.Module):
    """x + mixer(norm(x)) for each of its mixers; a feed-forward is a mixer like any other."""

    def __init__(self, mixers: list[Mixer], d_model: int, eps: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(d_model, eps) for _ in mixers)
        self.mixers = nn.ModuleList(mixers)

    def forward(self, x: Float[Tensor, "B T D"], packed: Int[Tensor, "N"] | None = None) -> Float[Tensor, "B T D"]:
        for norm, mixer in zip(self.norms, self.mixers):
            x = x + mixer(norm(x), packed)
        return x

    def prefill(self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        new = {}
        for i, (norm, mixer) in enumerate(zip(self.norms, self.mixers)):
            y, new[str(i)] = mixer.prefill(norm(x), state.scope(str(i)), lengths)
            x = x + y
        return x, State.join(new, state.length)

    def step(self, x: Float[Tensor, "B 1 D"], state: State):
        new = {}
        for i, (norm, mixer) in enumerate(zip(self.norms, self.mixers)):
            y, new[str(i)] = mixer.step(norm(x), state.scope(str(i)))
            x = x + y
        return x, State.join(new, state.length)

    def init_state(self, batch_size: int, max_len: int = 0) -> State:
        states = {str(i): m.init_state(batch_size, max_len) for i, m in enumerate(self.mixers)}
        return State.join(states, next(iter(states.values())).length)

    def reserve(self, state: State, tokens: int) -> State:
        return State.join(
            {str(i): m.reserve(state.scope(str(i)), tokens) for i, m in enumerate(self.mixers)}, state.length
        )
