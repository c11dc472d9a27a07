#!/usr/bin/env python3
"""A mixture of experts against a dense model of equal active parameters: time to train, to read a prompt and to write a token.

python bench/moe_speed.py --n-experts 16 --top-k 2 --d-model 512
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from slipstream.bench.bound import Ratio, begin, conclude, options, told
from slipstream.core.quantities import duration_in_words, in_words
from slipstream.models.language_model import LanguageModel, language_model
from slipstream.train.config import Recipe
from slipstream.train.optim import Optimizers

SPEED = 1 / 0.8  # of training and reading: no less than 0.8 times the dense model's
DECODE = 1.5  # of writing, which is bound by the weights that are read, and by the calls of a layer where these are few
STEPS = 32  # tokens written in one measurement


def main() -> int:
    parser = options(__doc__, seconds=60, threads=1)
    parser.add_argument("--n-experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--arch", default="gated_deltanet", help="the mixer before each feed-forward")
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--n-layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a training step")
    parser.add_argument("--context", type=int, default=512, help="tokens of each")
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of the prompt")
    arguments = parser.parse_args()
    begin(arguments)
    settings = f"n_experts={arguments.n_experts}, top_k={arguments.top_k}"
    models = [made(arguments, f"{arguments.arch}/{ff}") for ff in ("swiglu", f"moe({settings})")]
    if not arguments.json:
        for m in models:
            print(
                f"{m.config.pattern}: {in_words(m.n_parameters())}, {in_words(m.n_active_parameters())} for one token"
            )
    parts = {"train": (training, SPEED), "prefill": (reading, SPEED), "decode": (writing, DECODE)}
    ratios = [
        told(ratio(name, [work(m, arguments) for m in models], bound, arguments), arguments)
        for name, (work, bound) in parts.items()
    ]
    return conclude(ratios, arguments)


def made(arguments: argparse.Namespace, pattern: str) -> LanguageModel:
    return language_model(pattern, n_layers=arguments.n_layers, d_model=arguments.d_model)


def training(model: LanguageModel, arguments: argparse.Namespace) -> Callable[[], None]:
    """One step: forward, backward, update."""
    tokens = torch.randint(0, 256, (arguments.batch, arguments.context), generator=torch.Generator().manual_seed(0))
    optimizers = Optimizers(model, Recipe())

    def run() -> None:
        logits = model(tokens)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizers.step(1e-4)

    return run


def reading(model: LanguageModel, arguments: argparse.Namespace) -> Callable[[], None]:
    tokens = torch.randint(0, 256, (1, arguments.prompt), generator=torch.Generator().manual_seed(0))
    return torch.no_grad()(lambda: model.prefill(tokens))


def writing(model: LanguageModel, arguments: argparse.Namespace) -> Callable[[], None]:
    """Tokens one after another, each another one, so that experts change."""
    tokens = torch.randint(0, 256, (STEPS, 1, 1), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def run() -> None:
        state = model.init_state(1, STEPS)
        for token in tokens:
            _, state = model.step(token, state)

    return run


def ratio(name: str, work: list[Callable[[], None]], bound: float, arguments: argparse.Namespace) -> Ratio:
    """Median times of the processor, in turns: other processes disturb them least."""
    dense, mixture = (statistics.median(t) for t in in_turns(work, arguments.seconds / 3))
    of = f"mixture {duration_in_words(mixture)} over dense {duration_in_words(dense)}"
    return Ratio(f"{name}, time", of, mixture / dense, bound)


def in_turns(work: list[Callable[[], None]], seconds: float) -> list[list[float]]:
    for run in work:
        run()
    times: list[list[float]] = [[] for _ in work]
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(times[0]) < 3:
        for run, own in zip(work, times):
            start = time.process_time()
            run()
            own.append(time.process_time() - start)
    return times


if __name__ == "__main__":
    sys.exit(main())
