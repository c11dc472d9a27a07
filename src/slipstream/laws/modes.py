"""Forward, prefill at any cut, and single steps are one function: the printed equation."""

from __future__ import annotations

import torch

from slipstream.laws.subject import B, Law, Subject, T, close, expect, in_pieces, in_steps, needs

CUTS = [(T,), (1, 22), (8, 8, 7), (5, 0, 11, 7), (1,) * T]


def forward_is_the_equation(s: Subject) -> None:
    """Forward is the printed equation."""
    close(s.mixer(s.input()), s.mixer.reference(s.input()))


@needs("prefill")
def any_cut_is_forward(s: Subject) -> None:
    """Prefill at any cut is forward."""
    draw = torch.Generator().manual_seed(2)
    random = [torch.randint(0, T + 1, (3,), generator=draw).sort().values.tolist() for _ in range(6)]
    cuts = CUTS + [tuple(b - a for a, b in zip([0, *points], [*points, T])) for points in random]
    want = s.mixer(s.input())
    for cut in cuts:
        for room in (T, 0):  # a cache that has room, and one that must grow
            y, state = in_pieces(s.mixer, s.input().split(list(cut), 1), s.mixer.init_state(B, room))
            close(y, want)
            expect(state.length.tolist() == [T] * B, f"length is {state.length.tolist()} after {T} tokens")


@needs("step")
def steps_are_forward(s: Subject) -> None:
    """Single steps are forward."""
    close(in_steps(s.mixer, s.input(), s.mixer.init_state(B, T))[0], s.mixer(s.input()))


@needs("prefill", "step")
def steps_continue_a_prefill(s: Subject) -> None:
    """Steps after a prefill, and a prefill after steps, are forward."""
    x, want = s.input(), s.mixer(s.input())
    y1, state = s.mixer.prefill(x[:, :10], s.mixer.init_state(B, T))
    y2, state = in_steps(s.mixer, x[:, 10:16], state)
    y3, _ = s.mixer.prefill(x[:, 16:], state)
    close(torch.cat([y1, y2, y3], 1), want)


@needs("prefill")
def no_tokens_change_nothing(s: Subject) -> None:
    """Reading no tokens changes nothing."""
    _, before = s.mixer.prefill(s.input(), s.mixer.init_state(B, T))
    y, after = s.mixer.prefill(s.input()[:, :0], before.clone())
    expect(y.shape == (B, 0, s.cls.tiny.d_model), f"shape is {tuple(y.shape)}")
    for name in before.slots:
        expect(torch.equal(after[name], before[name]), f"slot {name} changed")


def chunk_size_changes_nothing(s: Subject) -> None:
    """The size of a chunk changes nothing."""
    sizes = (2, 3, 16, 64) if "chunk_size" in s.cls.Config.model_fields else ()
    for chunk_size in sizes:
        close(s.build(chunk_size=chunk_size)(s.input()), s.mixer(s.input()))


@needs("prefill", "step")
def step_is_captured_whole(s: Subject) -> None:
    """A step is captured whole by torch.compile: no graph break, no host synchronisation."""
    torch._dynamo.reset()
    step = torch.compile(s.mixer.step, fullgraph=True, backend="eager")
    x = s.input()
    with torch.no_grad():
        _, state = s.mixer.prefill(x[:, :20], s.mixer.init_state(B, T))
        for t in range(20, T):
            y, state = step(x[:, t : t + 1], state)
            close(y, s.mixer(x)[:, t : t + 1])


LAWS: list[Law] = [
    forward_is_the_equation,
    any_cut_is_forward,
    steps_are_forward,
    steps_continue_a_prefill,
    no_tokens_change_nothing,
    chunk_size_changes_nothing,
    step_is_captured_whole,
]
