"""The one contract every sequence mixer keeps: three ways of computing one function, and a stated memory.

Axis letters: B batch, T tokens, D d_model. A feed-forward is a mixer without slots.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import chain
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slipstream.core.config import MixerConfig
from slipstream.core.cost import Cost
from slipstream.core.documents import over_documents
from slipstream.core.errors import InputError
from slipstream.core.state import Slot, State, grow

Mode = Literal["forward", "prefill", "step"]
PIECE = 1024  # tokens that a forward without gradients reads at once


class Mixer(nn.Module, ABC):
    """Maps x (B T D) to y (B T D). See house rules in CONTRIBUTING.md: a new mixer is one file.

    Class attributes every mixer states: name and family (in the class line), paper, use_when, tiny, symbols, oracle,
    train_order and decode_order (one of cost.ORDERS: how the cost of a whole sequence / of one token grows), limits; and how
    one token changes what is remembered: writes, erases, decays, reads, in the letters of the printed equation.
    """

    registry: ClassVar[dict[str, type[Mixer]]] = {}
    name: ClassVar[str]
    family: ClassVar[str]
    paper: ClassVar[str]  # authors, year, identifier, equation numbers
    use_when: ClassVar[str]  # one sentence for a person choosing
    writes: ClassVar[str] = ""  # what a token adds to the memory
    erases: ClassVar[str] = ""  # what it takes away by content
    decays: ClassVar[str] = ""  # what fades by itself, and at whose rate
    reads: ClassVar[str] = ""  # how an output is made of the memory
    train_order: ClassVar[str] = "T"
    decode_order: ClassVar[str] = "1"
    tiny: ClassVar[MixerConfig]  # the smallest honest size; the laws run on it
    symbols: ClassVar[Mapping[str, str]] = {}  # the paper's letter -> our name
    oracle: ClassVar[str] = ""  # what it is checked against, and where
    limits: ClassVar[Mapping[str, str]] = {}  # mode -> why it cannot be done; the laws assert the refusal
    no_weight_decay: ClassVar[tuple[str, ...]] = ()  # names of parameters the optimiser must not shrink
    untied: ClassVar[tuple[str, ...]] = ()  # parts that layers with one set of weights have each of their own
    no_gradient: ClassVar[tuple[str, ...]] = ()  # parts that only choose: no output has a gradient for their parameters
    cost_is_most: ClassVar[bool] = False  # the work depends on what is read, and cost() is the most it can be

    Config: ClassVar[type[MixerConfig]]

    def __init_subclass__(cls, name: str | None = None, family: str = "", **kwargs):
        super().__init_subclass__(**kwargs)
        if name is None:
            return
        if (other := Mixer.registry.get(name)) is not None and other.__module__ != cls.__module__:
            raise InputError(f"mixer {name!r} is declared twice: {inspect.getfile(other)} and {inspect.getfile(cls)}")
        cls.name, cls.family = name, family
        Mixer.registry[name] = cls

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def slots(self) -> dict[str, Slot]:
        """The only statement of state size: name -> Slot. Empty for a feed-forward."""

    @abstractmethod
    def prefill(
        self, x: Float[Tensor, "B T D"], state: State, lengths: Int[Tensor, "B"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """CHUNKED: any T >= 0, goes on from any state; any cut of the input gives the same outputs.

        lengths: rows are right-padded; each row's state is the one after its own last token. Outputs at padding mean nothing.
        """

    def forward(self, x: Float[Tensor, "B T I"], packed: Int[Tensor, "N"] | None = None) -> Float[Tensor, "B T D"]:
        """PARALLEL: whole sequences, for training. packed: cu_seqlens of documents in one (1 T D) row.

        x is d_model wide (I = D), but for a mixer that reads the embedding beside it.
        """
        if packed is not None:
            return over_documents(lambda rows, lengths: self._from_fresh(rows, lengths), x, packed)
        return self._from_fresh(x)

    def _from_fresh(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Without gradients a long sequence is read in pieces: any cut gives the same, and what is at hand stays in the cache."""
        state = self.init_state(x.shape[0], x.shape[1])
        if torch.is_grad_enabled() or lengths is not None or x.shape[1] <= PIECE:
            return self.prefill(x, state, lengths)[0]
        ys = []
        for piece in x.split(PIECE, 1):
            y, state = self.prefill(piece, state)
            ys.append(y)
        return torch.cat(ys, 1)

    def step(self, x: Float[Tensor, "B 1 D"], state: State) -> tuple[Float[Tensor, "B 1 D"], State]:
        """RECURRENT: one token; static shapes, no host synchronisation."""
        return self.prefill(x, state)

    @abstractmethod
    def reference(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The printed equation, token by token, in the paper's layout; slow and clear."""

    def op_flops(self, T: int, B: int, mode: Mode) -> float:
        """Flops of the matrix products that are not nn.Linear layers: T tokens, or one after T for mode "step"."""
        return 0.0

    def idle_parameters(self, tokens: int = 1) -> int:
        """Parameters that so many tokens leave unread: of experts that none of them chose, by an even router."""
        return 0

    def cost(self, T: int, B: int = 1, mode: Mode = "forward") -> Cost:
        """Flops and bytes of T tokens (forward, prefill), or of one token after T (step)."""
        tokens = B if mode == "step" else B * T
        projections = [m for m in self.modules() if isinstance(m, nn.Linear)]
        linear = sum(m.in_features * m.out_features for m in projections)
        weights = sum(p.nbytes for p in self.parameters())
        weights += sum(b.nbytes for m in projections for b in m.buffers())  # codes and scales of quantised ones
        weights -= self.idle_parameters(tokens) * self._activations()[0].itemsize
        moved = 0 if mode == "forward" else B * self.state_moved(T)
        return Cost(2.0 * linear * tokens + self.op_flops(T, B, mode), weights + moved)

    def _activations(self) -> tuple[torch.dtype, torch.device]:
        """Dtype and device of the activations: those of the first parameter, or buffer where projections are quantised."""
        p = next(chain(self.parameters(), self.buffers()))
        return p.dtype, p.device

    def init_state(self, batch_size: int, max_len: int = 0) -> State:
        """A fresh state; growing slots get room for max_len tokens (prefill makes more when it must)."""
        dtype, device = self._activations()
        slots = {
            name: torch.full(
                (batch_size, *s.after(max_len)),
                s.start,
                dtype=s.dtype_beside(dtype),
                device=device,
            )
            for name, s in self.slots().items()
        }
        return State(slots, torch.zeros(batch_size, dtype=torch.long, device=device))

    def state_bytes(self, T: int) -> int:
        """Bytes one sequence keeps after T tokens: read off the slots, never typed by hand."""
        return sum(n for _, n in self._slot_bytes(T))

    def state_moved(self, T: int) -> int:
        """Bytes of them that the next token moves: all are read, and those written again that do not grow."""
        return sum(n if s.grows else 2 * n for s, n in self._slot_bytes(T))

    def _slot_bytes(self, T: int) -> list[tuple[Slot, int]]:
        dtype, _ = self._activations()
        return [(s, torch.Size(s.after(T)).numel() * s.dtype_beside(dtype).itemsize) for s in self.slots().values()]

    def reserve(self, state: State, tokens: int) -> State:
        """The state with room for so many more tokens in its growing slots (at least doubled, so that streams stay cheap)."""
        growing = {n: s for n, s in self.slots().items() if s.grows}
        if not growing:
            return state
        needed = int(state.length.max()) + tokens if len(state.length) else tokens
        slots = dict(state.slots)
        for name, slot in growing.items():
            entries = slot.after(needed)[0]
            if slots[name].shape[1] < entries:
                slots[name] = grow(slots[name], max(entries, 2 * slots[name].shape[1]), slot.start)
        return State(slots, state.length)
