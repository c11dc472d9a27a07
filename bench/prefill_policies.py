#!/usr/bin/env python3
"""What prefill policies save in time and lose in what they read, on one layer of attention, against reading all of a prompt.

python bench/prefill_policies.py

Queries and keys are made up in the shapes that heads of trained models show (Jiang et al. 2024, arXiv:2407.02490, figure 3):
every head looks at the first tokens, and beside these near, at single columns, at fixed distances, or at earlier passages of
the same topic. The error is that of the outputs, root mean square, as a share of the dense ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from slipstream.bench.bound import Ratio, begin, conclude, options, run, told
from slipstream.bench.timing import interleaved, ratio
from slipstream.layers.rope import rope
from slipstream.ops.softmax import PLAIN
from slipstream.policies.policy import prefill_policy

HEAD_DIM, NOISE, FIRST = (
    64,
    0.5,
    4,
)  # width of a head; standard deviation of what means nothing; first tokens, seen by all
KINDS = ("near", "columns", "distance", "topic") * 2  # what each of the 8 heads looks at, beside the first tokens
STRENGTH = 14.0  # logit of what a head looks at, where all others, about 0, share a hundredth of the weights at 16,384
PLACED, TOPIC = 32, 24  # channels of positions and of topics; one is left for columns
COLUMNS, PASSAGE, TOPICS, BACK = (
    48,
    160,
    24,
    1280,
)  # single keys; tokens of a passage; topics there are; a fixed distance
POLICIES = ("minference", "xattention", "flexprefill", "sage")
# promised of 16,384 tokens and more: time over dense, and error. Sage computes what integers would; on a CPU it saves no time.
PROMISED = {"minference": (1.0, 0.25), "xattention": (1.0, 0.1), "flexprefill": (1.0, 0.25), "sage": (12.0, 0.03)}
LONG, ANY = 16384, (100.0, 1.0)  # of shorter ones nothing is promised


def main() -> int:
    parser = options(__doc__, seconds=60, threads=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, LONG], help="lengths of the prompt")
    arguments = parser.parse_args()
    begin(arguments)
    with torch.no_grad():
        return conclude(
            [told(r, arguments) for tokens in arguments.tokens for r in ratios(tokens, arguments)], arguments
        )


def ratios(tokens: int, arguments: argparse.Namespace) -> Iterator[Ratio]:
    """Of every policy, its time and its error; what is promised of long prompts is not of short ones."""
    q, k, v = prompt(tokens)
    work = {name: partial(read, name, q, k, v) for name in ("dense", *POLICIES)}
    times, whole = interleaved(work, arguments.seconds, least=3), work["dense"]()
    for name in POLICIES:
        slowest, worst = PROMISED[name] if tokens >= LONG else ANY
        of = f"{times[name].seconds:.3f} s over {times['dense'].seconds:.3f} s"
        yield Ratio(f"{name} at {tokens}", of, ratio(times[name], times["dense"]), slowest)
        yield Ratio(f"{name} at {tokens}: error", by_kind(work[name], whole), error(work[name](), whole), worst)


def read(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return prefill_policy(name).attend(q, k, v, torch.zeros(1, dtype=torch.long), None, PLAIN)


def error(found: Tensor, whole: Tensor) -> float:
    return ((found - whole).square().mean() / whole.square().mean()).sqrt().item()


def by_kind(found: Callable[[], Tensor], whole: Tensor) -> str:
    """The same of the heads of each kind."""
    heads = {kind: [h for h, of in enumerate(KINDS) if of == kind] for kind in dict.fromkeys(KINDS)}
    o = found()
    return ", ".join(f"{kind} {error(o[:, :, h], whole[:, :, h]):.3f}" for kind, h in heads.items())


def prompt(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (1 T 8 64). A head has channels for places, for topics and one for columns; what it does not use is noise."""
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, tokens, len(KINDS), HEAD_DIM, generator=draw) for _ in range(3))
    q, k = NOISE * q, NOISE * k
    size = (STRENGTH * HEAD_DIM**0.5) ** 0.5  # of a feature in the query and in the key it finds
    for h, kind in enumerate(KINDS):
        if kind == "topic":
            by_topic = size * topics(tokens, draw)
            q[0, :, h, PLACED : PLACED + TOPIC] += by_topic
            k[0, :, h, PLACED : PLACED + TOPIC] += by_topic
        elif kind == "columns":
            k[0, torch.randperm(tokens, generator=draw)[:COLUMNS], h, -1] += size
        else:
            back = 0 if kind == "near" else min(BACK, tokens // 4)
            q[0, :, h, :PLACED] += size * places(tokens, back)
            k[0, :, h, :PLACED] += size * places(tokens, 0)
        k[0, :FIRST, h, -1] += size
        q[0, :, h, -1] += size
    return q, k, v


def places(tokens: int, back: int) -> Tensor:
    """Unit vectors (T P) that are alike where places are near."""
    same = torch.full((1, tokens, 1, PLACED), PLACED**-0.5)
    return rope(same, (torch.arange(tokens) - back)[None], 10000.0)[0, :, 0]


def topics(tokens: int, draw: torch.Generator) -> Tensor:
    """Unit vectors (T P), the same all through a passage and in others of its topic."""
    of_topics = torch.nn.functional.normalize(torch.randn(TOPICS, TOPIC, generator=draw), dim=-1)
    passages = torch.randint(TOPICS, (-(-tokens // PASSAGE),), generator=draw)
    return of_topics[passages].repeat_interleave(PASSAGE, 0)[:tokens]


if __name__ == "__main__":
    run(main)
