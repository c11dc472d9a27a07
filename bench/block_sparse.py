#!/usr/bin/env python3
"""Attention to a tenth of all causal pairs, chosen by blocks, takes at most a quarter of the time of full causal attention of
the same width (torch's own), over 16384 tokens.

    python bench/block_sparse.py --threads 2
"""

from __future__ import annotations

import sys

import torch

from slipstream.bench.bound import Ratio, begin, conclude, options, told
from slipstream.bench.timing import interleaved, ratio
from slipstream.ops.attention import attention
from slipstream.ops.block_sparse import block_sparse, blocks_of

BOUND = 1 / 4
HEADS, HEAD_DIM = 8, 64


def main() -> int:
    parser = options(__doc__, seconds=60, threads=1)
    parser.add_argument("--tokens", type=int, default=16384, help="of the sequence")
    parser.add_argument("--density", type=float, default=0.1, help="share of causal pairs that is read")
    parser.add_argument("--block-sizes", default="64,128", help="tokens of a block")
    arguments = parser.parse_args()
    begin(arguments)
    sizes = [int(size) for size in arguments.block_sizes.split(",")]
    found = [against_full(size, arguments.tokens, arguments.density, arguments.seconds) for size in sizes]
    return conclude([told(r, arguments) for r in found], arguments)


@torch.no_grad()
def against_full(block_size: int, tokens: int, density: float, seconds: float) -> Ratio:
    """Medians in one run, in turns. Blocks are chosen at random, a token's own beside them."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, HEADS, HEAD_DIM, generator=draw) for _ in "qkv")
    past = torch.zeros(1, dtype=torch.long)
    own, blocks = blocks_of(past, tokens, block_size)
    earlier = torch.arange(blocks) < own[0][:, None]
    wanted = (density * earlier.sum() - (1 - density) * len(own[0]) / 2) / earlier.sum()
    chosen = (torch.rand(1, HEADS, *earlier.shape, generator=draw) < wanted) & earlier
    share = float((chosen.sum() / HEADS + len(own[0]) / 2) / (earlier.sum() + len(own[0]) / 2))
    found = interleaved(
        {"sparse": lambda: block_sparse(q, k, v, chosen, past, block_size), "full": lambda: attention(q, k, v)},
        seconds,
        least=3,
    )
    took = f"{share:.1%} of pairs: {found['sparse'].seconds:.2f} s over {found['full'].seconds:.2f} s"
    return Ratio(f"blocks of {block_size}", took, ratio(found["sparse"], found["full"]), BOUND)


if __name__ == "__main__":
    sys.exit(main())
