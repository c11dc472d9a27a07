"""The stack: blocks from a pattern, a last norm. Knows nothing of tokens, so that any frontend and any head fit it.

Every mixer reads the residual stream through a norm, and what it says is added to it, through another where the wiring
says so. A pattern may have a mixer read the stream beside what entered the stack (reads_embedding), speak to the next one
alone (to_next), or have the weights of an earlier one (tied). With reversible layers there are two streams, which take turns
at being read and written (see models/reversible.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.errors import InputError
from slipstream.core.lender import Lender, Lent
from slipstream.core.mixer import Mixer
from slipstream.core.registry import build
from slipstream.core.state import State
from slipstream.layers.experts import Experts
from slipstream.layers.stream_norm import stream_norm
from slipstream.models.block import Block
from slipstream.models.config import Wiring
from slipstream.models.depths import Skipping
from slipstream.models.pattern import BlockSpec
from slipstream.models.reversible import Layer, reversibly
from slipstream.models.sharing import lenders, owners, placed
from slipstream.models.tying import tie

READS_EMBEDDING = (
    "reads_embedding"  # the setting of a mixer that reads 2 d_model: the stream, and what entered the stack
)
RESIDUAL_OUTPUTS = ("o_proj", "out_proj", "down_proj")  # what writes to the residual stream, in every family
PLAIN = Wiring()
Read = Callable[[Mixer, Tensor, State], tuple[Tensor, State]]
Share = Callable[[Lender, Tensor, State, Lent | None], tuple[Tensor, State, Lent]]


class Place(NamedTuple):
    """Where a mixer stands ("block.mixer"), the norm of what it reads, itself, the norm of what it says."""

    at: str
    norm: nn.Module
    mixer: Mixer
    out_norm: nn.Module


class Stack(nn.Module):
    """h (B T D) -> h (B T D); its state is its mixers' states under `<block>.<mixer>.<slot>`."""

    def __init__(
        self,
        specs: list[BlockSpec],
        d_model: int,
        defaults: dict[str, dict],
        eps: float = 1e-6,
        wiring: Wiring = PLAIN,
    ) -> None:
        """defaults: settings by mixer name that the pattern's own settings override."""
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(
                [
                    _skipped(build(p.name, {"d_model": d_model, **defaults.get(p.name, {}), **p.settings}), i, wiring)
                    for p in spec.parts
                ],
                [d_model * (2 if p.settings.get(READS_EMBEDDING) else 1) for p in spec.parts],
                d_model,
                eps,
                wiring,
            )
            for i, spec in enumerate(specs)
        )
        self.norm = stream_norm(wiring.norm, d_model, eps)
        self.scale = wiring.residual_scale
        self.carry = wiring.carry_scale if wiring.norm_place == "stream" else None
        self.n_streams = 2 if wiring.reversible else 1
        self.lenders = lenders(specs)
        self.sharing = {*self.lenders, *self.lenders.values()}
        self.embedded = {at for at, part in placed(specs) if part.settings.get(READS_EMBEDDING)}
        self.asides = {at for at, part in placed(specs) if part.to_next}
        self.tied = owners(specs)
        self._refuse(wiring, specs)
        for at, owner in self.tied.items():
            tie(self.blocks, at, owner)
        self._scale_residual_outputs()

    def _refuse(self, wiring: Wiring, specs: list[BlockSpec]) -> None:
        """What cannot be together."""
        if wiring.reversible and self.lenders:
            raise InputError(
                "reversible layers are made again from what comes after them, keys and values of an earlier layer are "
                "not: choose reversible or share_kv (own_kv=false), value_residual"
            )
        if wiring.reversible and self.carry is not None:
            raise InputError("reversible layers add to a stream as it is: choose reversible or norm_place stream")
        if (self.embedded or self.asides) and (wiring.reversible or self.carry is not None):
            raise InputError(
                "layers that read the embedding or speak to the next alone need the plain stream: not reversible, and norm_place "
                "before, after or around"
            )
        if wiring.skip_every and (self.lenders or self.tied or self.embedded):
            raise InputError(
                "tokens that go round a layer leave it nothing to share: choose skip_every or share_kv, value_residual, tied and "
                "reads_embedding"
            )
        if specs and specs[-1].parts[-1].to_next:
            raise InputError(
                f"{specs[-1].parts[-1].name}(to_next=true) is the last of the model: nobody reads what it says"
            )

    def _scale_residual_outputs(self) -> None:
        """Each write to the residual stream by 1/sqrt(number of writes), so that its size does not grow with depth (GPT-2)."""
        writes = len(self.mixers())
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in RESIDUAL_OUTPUTS:
                module.weight.data.mul_(writes**-0.5)
            elif isinstance(module, Experts):
                module.down_proj.data.mul_(writes**-0.5)

    def places(self) -> Iterator[Place]:
        """Every mixer in order."""
        for i, block in enumerate(self.blocks):
            for j, (norm, mixer, out_norm) in enumerate(zip(block.norms, block.mixers, block.out_norms)):
                yield Place(f"{i}.{j}", norm, mixer, out_norm)

    def mixers(self) -> list[Mixer]:
        return [place.mixer for place in self.places()]

    def forward(self, h: Float[Tensor, "B T D"], packed: Int[Tensor, "N"] | None = None) -> Float[Tensor, "B T D"]:
        if self.n_streams == 2 and torch.is_grad_enabled():
            return self._out(reversibly(self._layers(packed), h, h))
        lent: dict[str, list[Lent]] = {}

        def call(place: str, mixer: Mixer, x: Tensor) -> Tensor:
            if place not in self.sharing:
                return mixer(x, packed)
            y, lent[place] = cast(Lender, mixer).share(x, packed, lent.get(self.lenders.get(place, place)))
            return y

        return self._through(h, call)

    def _layers(self, packed: Tensor | None) -> list[Layer]:
        """Every mixer with its norms as one function."""

        def layer(place: Place) -> Layer:
            modules = place.norm, place.mixer, place.out_norm
            run = partial(self._says, place, call=lambda at, mixer, x: mixer(x, packed))
            return Layer(run, [p for module in modules for p in module.parameters()])

        return [layer(place) for place in self.places()]

    def prefill(self, h: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None):
        def share(mixer: Lender, x: Tensor, entering: State, lent: Lent | None) -> tuple[Tensor, State, Lent]:
            return mixer.share_prefill(x, entering, lent, lengths)

        tokens = h.shape[1] if lengths is None else lengths
        return self._on(h, state, tokens, lambda mixer, x, entering: mixer.prefill(x, entering, lengths), share)

    def step(self, h: Float[Tensor, "B 1 D"], state: State):
        def share(mixer: Lender, x: Tensor, entering: State, lent: Lent | None) -> tuple[Tensor, State, Lent]:
            return mixer.share_step(x, entering, lent)

        return self._on(h, state, 1, lambda mixer, x, entering: mixer.step(x, entering), share)

    def _on(self, h: Tensor, state: State, tokens: int | Tensor, read: Read, share: Share) -> tuple[Tensor, State]:
        """From a state to the next. A layer that borrows is handed what its lender made of these tokens."""
        new, lent = dict[str, State](), dict[str, Lent]()
        parts, none = state.parts(2), State({}, state.length)

        def call(place: str, mixer: Mixer, x: Tensor) -> Tensor:
            entering = parts.get(place, none)
            if place in self.sharing:
                given = lent.get(self.lenders.get(place, place))
                y, new[place], lent[place] = share(cast(Lender, mixer), x, entering, given)
            else:
                y, new[place] = read(mixer, x, entering)
            return y

        y = self._through(h, call)
        return y, State.join(new, state.length + tokens)

    def _through(self, h: Tensor, call: Callable[[str, Mixer, Tensor], Tensor]) -> Tensor:
        """Every mixer in turn reads the last stream and writes to the first, which becomes the last."""
        streams, aside = (h,) * self.n_streams, None
        for place in self.places():
            x = streams[-1] if aside is None else streams[-1] + aside
            x, aside = torch.cat([x, h], -1) if place.at in self.embedded else x, None
            if place.at in self.asides:
                aside = self._says(place, x, call)
            else:
                streams = (*streams[1:], self._written(place, streams[0], x, call))
        return self._out(streams)

    def _written(
        self, place: Place, stream: Tensor, x: Tensor, call: Callable[[str, Mixer, Tensor], Tensor]
    ) -> Float[Tensor, "B T D"]:
        """The stream that a mixer writes to: as it was, or where norms are of the stream itself, a factor times the normed one."""
        if self.carry is None:
            return stream + self._says(place, x, call)
        h = place.norm(x)
        return h * self.carry + call(place.at, place.mixer, h) * self.scale

    def _says(self, place: Place, h: Tensor, call: Callable[[str, Mixer, Tensor], Tensor]) -> Tensor:
        """What a mixer that reads h adds to the residual stream."""
        y = place.out_norm(call(place.at, place.mixer, place.norm(h)))
        return y if self.scale == 1 else y * self.scale

    def _out(self, streams: tuple[Tensor, ...]) -> Tensor:
        """The sum of the streams (Reformer lays them side by side, which would double the head); the norm takes the factor."""
        return self.norm(reduce(torch.add, streams))

    def init_state(self, batch_size: int, max_len: int = 0) -> State:
        states = {p.at: p.mixer.init_state(batch_size, max_len) for p in self.places()}
        return State.join(states, next(iter(states.values())).length)

    def reserve(self, state: State, tokens: int) -> State:
        reserved = {p.at: p.mixer.reserve(state.scope(p.at), tokens) for p in self.places()}
        return State.join(reserved, state.length)


def _skipped(mixer: Mixer, block: int, wiring: Wiring) -> Mixer:
    """The mixer itself, or one that tokens may go round."""
    skips = wiring.skip_every and block % wiring.skip_every == wiring.skip_every - 1
    return Skipping(mixer, wiring.skip_capacity) if skips else mixer
