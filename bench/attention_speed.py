#!/usr/bin/env python3
"""What sparse attention and cache policies save in time, as ratios to full attention of the same width in one run.

python bench/attention_speed.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.bench.bound import Ratio, begin, conclude, options, run, told
from slipstream.bench.timing import interleaved, ratio
from slipstream.core.state import State
from slipstream.ops.attention import window_attention
from slipstream.ops.block_sparse import block_sparse
from slipstream.ops.tape import record
from slipstream.policies.policy import KVHeads, Reading, cache_policy, prefill_policy

HEADS, HEAD_DIM, WINDOW, BLOCK, DENSITY = 8, 64, 512, 128, 0.1
KV = KVHeads(HEADS, HEADS, HEAD_DIM, HEAD_DIM)


def main() -> int:
    parser = options(__doc__, seconds=20, threads=1)
    parser.add_argument("--tokens", type=int, default=16384, help="length of the sequence, or of the context")
    arguments = parser.parse_args()
    begin(arguments)
    with torch.no_grad():
        return conclude([told(r, arguments) for r in ratios(arguments)], arguments)


def ratios(arguments: argparse.Namespace) -> Iterator[Ratio]:
    tokens, seconds = arguments.tokens, arguments.seconds
    q, k, v = lines(tokens)
    yield against_full(f"window of {WINDOW}", lambda: windowed(q, k, v), lambda: full(q, k, v), seconds, 1 / 8)
    chosen, past = blocks(tokens), torch.zeros(1, dtype=torch.long)
    yield against_full(
        f"blocks of {BLOCK} at {DENSITY:.0%}",
        lambda: block_sparse(q, k, v, chosen, past, BLOCK),
        lambda: full(q, k, v),
        seconds,
        1 / 4,
    )
    for policy in ("quest:512", "h2o:512"):
        yield against_full(policy, decoding(policy, tokens), decoding("full", tokens), seconds, 1 / 4)


def against_full(
    name: str, this: Callable[[], object], full: Callable[[], object], seconds: float, bound: float
) -> Ratio:
    times = interleaved({"this": this, "full": full}, seconds, least=3)
    a, b = times["this"], times["full"]
    return Ratio(name, f"{1e3 * a.seconds:.2f} ms over {1e3 * b.seconds:.2f} ms", ratio(a, b), bound)


def lines(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, HEADS, HEAD_DIM, generator=draw) for _ in range(3))
    return q, k, v


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own causal attention, tiled."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (F.pad(x, (0, 0, 0, 0, WINDOW - 1, 0)) for x in (k, v))
    return window_attention(q, k, v, torch.zeros(1, dtype=torch.long), WINDOW)


def blocks(tokens: int) -> Tensor:
    """For every head and block of queries its own block and earlier ones by chance: DENSITY of the causal pairs."""
    n = tokens // BLOCK
    chance = torch.rand(1, HEADS, n, n, generator=torch.Generator().manual_seed(1)) < DENSITY
    return (chance | torch.eye(n, dtype=torch.bool)).tril()


def decoding(spec: str, tokens: int) -> Callable[[], object]:
    """One token's attention behind a long context, with all that the policy does for it, recorded as models record steps."""
    policy, how = cache_policy(spec, KV), Reading(prefill_policy("dense"))
    q, k, v = lines(tokens + 1)
    state = State({n: torch.full((1, *s.after(tokens + 1)), s.start, dtype=s.dtype or torch.float32)
                   for n, s in policy.slots().items()}, torch.zeros(1, dtype=torch.long))  # fmt: skip
    for i in range(0, tokens, 1024):
        piece = slice(i, min(i + 1024, tokens))
        _, slots = policy.prefill(q[:, piece], k[:, piece], v[:, piece], state, None, how)
        state = state.advance(piece.stop - piece.start, **slots)
    new = [x[:, tokens:] for x in (q, k, v)]
    _, tape = record(lambda: policy.step(*new, state, how), [*new, *state.slots.values(), state.length])
    return tape.run


if __name__ == "__main__":
    run(main)
