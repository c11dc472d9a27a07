"""The delta rule over a mixer's lines: q, k, v by heads, q and k of unit length, then the rule in chunks or for one token.

What differs between its layers is given: how strongly each token writes (beta) and how fast the state fades (log_decay).
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from slipstream.core.mixer import Mixer
from slipstream.core.state import State
from slipstream.layers.lines import lines_reference, run_lines, silu_unless_convolved
from slipstream.ops.chunks import LogDecay
from slipstream.ops.delta_scan import delta_scan, delta_step
from slipstream.ops.l2_norm import l2_norm


def by_heads(mixer: Mixer, lines: dict[str, Tensor], n_heads: int, n_v_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q and k (B T H K), v (B T G V): split, and with the activation a line still lacks."""
    q, k, v = (silu_unless_convolved(mixer)(lines[n]) for n in "qkv")
    return *(t.unflatten(-1, (n_heads, -1)) for t in (q, k)), v.unflatten(-1, (n_v_heads, -1))  # type: ignore[return-value]


def unit(qk: Float[Tensor, "B T H K"], n_v_heads: int) -> Float[Tensor, "B T G K"]:
    """Unit length, and repeated for the value heads that share it."""
    qk = l2_norm(qk)
    return qk.repeat_interleave(n_v_heads // qk.shape[2], dim=2) if n_v_heads > qk.shape[2] else qk


def unit_heads(mixer: Mixer, lines: dict[str, Tensor], n_heads: int, n_v_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the rule takes: unit q, unit k, and v, all with n_v_heads heads."""
    q, k, v = by_heads(mixer, lines, n_heads, n_v_heads)
    return unit(q, n_v_heads), unit(k, n_v_heads), v


def delta_prefill(
    mixer: Mixer,
    n_heads: int,
    chunk_size: int,
    x: Float[Tensor, "B T D"],
    beta: Float[Tensor, "B T G"],
    log_decay: LogDecay | None,
    state: State,
    lengths: Int[Tensor, "B"] | None,
) -> tuple[Float[Tensor, "B T G V"], State]:
    """Outputs by heads, and the state after each row's last token (slot S, and those of the lines)."""
    lines, convs = run_lines(mixer, "qkv", x, state, lengths)
    q, k, v = unit_heads(mixer, lines, n_heads, beta.shape[2])
    o, S = delta_scan(q, k, v, beta, log_decay, state["S"], lengths, k.shape[3] ** -0.5, chunk_size)
    return o, state.advance(x.shape[1] if lengths is None else lengths, S=S, **convs)


def delta_one(
    mixer: Mixer,
    n_heads: int,
    x: Float[Tensor, "B 1 D"],
    beta: Float[Tensor, "B 1 G"],
    log_decay: LogDecay | None,
    state: State,
) -> tuple[Float[Tensor, "B 1 G V"], State]:
    """One token of delta_prefill."""
    lines, convs = run_lines(mixer, "qkv", x, state, None)
    q, k, v = unit_heads(mixer, lines, n_heads, beta.shape[2])
    o, S = delta_step(q, k, v, beta, log_decay, state["S"], k.shape[3] ** -0.5)
    return o, state.advance(1, S=S, **convs)


def unit_heads_reference(
    mixer: Mixer, x: Float[Tensor, "B T D"], n_heads: int, n_v_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """unit_heads of a whole sequence, by torch's own convolution."""
    return unit_heads(mixer, lines_reference(mixer, "qkv", x), n_heads, n_v_heads)
