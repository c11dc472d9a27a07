#!/usr/bin/env python3
"""What cache and prefill policies cost in quality: one trained attention model, run under each of them.

    python bench/cache_policies.py train --out MODEL
    python bench/cache_policies.py measure MODEL

The model reads prose with facts planted in it and learns both: to predict the text, and to find a fact again. It is then asked
about facts that lie 4,000 tokens back, and to predict text it has never seen, under every policy. A record each goes to
docs/policies/results.jsonl: recall, bits per byte, bytes held, keys read a token, and the time of the prompt as a ratio to the
dense one in the same run; what stands there already is not measured again. `python docs/policies.py` renews docs/policies.md.
Which heads keep everything under duo_attention is found on the text that was learned from, never on what is asked about.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

import slipstream as ss
from slipstream.bench.bound import run
from slipstream.bench.facts import BYTES, Facts
from slipstream.bench.probe_model import EMBEDDING_STD
from slipstream.bench.task import Batch, Level
from slipstream.compare.results import Record, Results
from slipstream.core.state import State
from slipstream.data.source import HELD_OUT, read_text
from slipstream.models.language_model import LanguageModel
from slipstream.models.policies import Policies, keys_read, with_policies
from slipstream.models.retrieval_heads import retrieval_heads

FOLDER = Path(__file__).parent.parent / "docs" / "policies"
PATTERN = "attention(conv_size=4, rope_base=none)"  # without positions what is learned on 1,000 tokens carries to 4,000
N_LAYERS, D_MODEL, STEPS, ROWS, LR = 4, 128, 1000, 4, 2e-3
GAPS = (16, 64, 256, 960)  # of the rungs: tokens between the facts and the questions
KNOWN = 0.95  # running accuracy for the next rung
DISTANCE, QUESTIONED_ROWS, PIECE = 4000, 12, 512  # of the questions; tokens of a prompt read at once
READ, PREDICTED = (
    704,
    256,
)  # tokens of unseen text read, then predicted one by one: as many as rows had while it learned
PROMPT = 4096  # tokens of the prompt whose time is taken
CACHES = [
    "full", "streaming_llm:128", "streaming_llm:512", "streaming_llm:2048", "h2o:128", "h2o:512", "h2o:2048",
    "snapkv:128", "snapkv:512", "snapkv:2048", "quest:128", "quest:512", "quest:2048", "kv_int8", "kv_int4",
]  # fmt: skip
PREFILLS = ["dense", "sage", "minference", "xattention", "flexprefill"]
STREAMING, RETRIEVING = (
    128,
    (0.125, 0.25, 0.5, 0.75),
)  # last tokens of streaming heads; shares of heads that keep everything


def model_of(tokens: int, seed: int) -> LanguageModel:
    model = ss.language_model(PATTERN, n_layers=N_LAYERS, d_model=D_MODEL, vocab_size=tokens, seed=seed)
    torch.nn.init.normal_(model.embedding.weight, std=EMBEDDING_STD, generator=torch.Generator().manual_seed(seed))
    return model


def texts() -> tuple[bytes, bytes]:
    """What is learned from, and what is held out."""
    text = read_text().content
    cut = int(len(text) * (1 - HELD_OUT))
    return text[:cut], text[cut:]


def train(out: Path, steps: int, seed: int) -> None:
    """Up the rungs of distance; the loss is that of every token and, once more, that of the answers."""
    task = Facts(texts()[0])
    model, draw = model_of(task.vocab_size, seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.05)
    rungs, grasp = [replace(task.ladder()[0], gap=8), *(replace(task.goal, gap=gap) for gap in GAPS)], 0.0
    for _ in track(range(steps), "learning", console=Console(stderr=True)):
        level = task.drawn(rungs[0], draw)
        rows = max(ROWS, ROWS * GAPS[-1] // (6 * level.pairs + rungs[0].gap) // 2)
        batch = task.batch(rows, level, draw)
        loss, right = losses(model(batch.tokens), batch)
        (loss + text_loss(model, task.text, draw)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        grasp += 0.1 * (right - grasp)
        if grasp > KNOWN and len(rungs) > 1:
            rungs, grasp = rungs[1:], 0.0
    model.save(out)
    print(f"{len(rungs) - 1} rungs left, {grasp:.0%} right on the last, loss {loss.item():.2f}; saved in {out}")


def text_loss(model: LanguageModel, text: Tensor, draw: torch.Generator, rows: int = 2) -> Tensor:
    """Of plain text, in rows as long as the longest with facts."""
    length = GAPS[-1] + 64
    start = torch.randint(len(text) - length - 1, (rows, 1), generator=draw)
    tokens = text[start + torch.arange(length + 1)]
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def losses(logits: Tensor, batch: Batch) -> tuple[Tensor, float]:
    text = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.tokens[:, 1:].flatten())
    asked = logits.gather(1, batch.asked[..., None].expand(-1, -1, logits.shape[-1]))
    right = (asked.argmax(-1) == batch.answers).float().mean().item()
    return text + F.cross_entropy(asked.flatten(0, 1), batch.answers.flatten()), right


@torch.no_grad()
def measure(folder: Path, out: Path, rows: int) -> None:
    """One record a policy, the dense prompt timed beside each."""
    model, results = ss.load(folder).eval(), Results(out)
    dense = with_policies(model, cache="full", prefill_policy="dense")
    shares = {f"duo_attention:{STREAMING}, {share:.1%} of the heads": share for share in RETRIEVING}
    policies = [(c, "dense") for c in [*CACHES, *shares]] + [("full", p) for p in PREFILLS[1:]]
    with results.claimed():
        for cache, prefill in policies:
            name = f"cache={cache}, prefill_policy={prefill}"
            if results.has("policy", name):
                continue
            caches = by_heads(model, shares[cache]) if cache in shares else cache
            changed = with_policies(model, cache=caches, prefill_policy=prefill)
            record = {"kind": "policy", "arch": name, "cache": cache, "prefill": prefill} | quality(changed, rows)
            record["prompt_time"] = prompt_time(changed, dense)
            results.add(record)
            print(record, flush=True)


def by_heads(model: LanguageModel, share: float) -> Policies:
    """The cache of each layer, where so many of all heads keep everything."""
    task = Facts(texts()[0])
    level = Level(pairs=task.goal.pairs, symbols=task.goal.symbols, gap=GAPS[-1])
    rows = task.batch(ROWS, level, torch.Generator().manual_seed(11)).tokens
    return retrieval_heads(model, rows, STREAMING, share)


def quality(model: LanguageModel, rows: int) -> Record:
    task = Facts(texts()[1])
    level = Level(pairs=task.goal.pairs, symbols=task.goal.symbols, gap=DISTANCE)
    right, asked, draw = 0, 0, torch.Generator().manual_seed(7)
    for _ in range(rows // ROWS):
        batch = task.batch(ROWS, level, draw)
        said, held = answered(model, batch)
        right += int((said == batch.answers).sum())
        asked += batch.answers.numel()
    found = {"recall": [right, asked], "bits_per_byte": predicted(model), "bytes": held // ROWS}
    return found | {"keys_read": keys_read(model, DISTANCE), "tokens": batch.tokens.shape[1]}


def answered(model: LanguageModel, batch: Batch) -> tuple[Tensor, int]:
    """The prompt in pieces up to the first question; then, token by token, what the model says to each question. And the
    bytes that are held in the end."""
    first = int(batch.asked[0, 0])
    state = read(model, batch.tokens[:, :first], batch.tokens.shape[1])
    said = []
    for t in range(first, batch.tokens.shape[1]):
        logits, state = model.step(batch.tokens[:, t : t + 1], state)
        said.append(logits[:, 0, batch.choices].argmax(-1))
    return batch.choices[torch.stack(said, 1).gather(1, batch.asked - first)], state.nbytes


def read(model: LanguageModel, tokens: Tensor, room: int) -> State:
    state = model.init_state(len(tokens), room)
    for piece in tokens.split(PIECE, 1):
        _, state = model.prefill(piece, state, logits=None)
    return state


def predicted(model: LanguageModel) -> float:
    """Bits per byte of unseen text behind a prompt."""
    text = torch.tensor(list(texts()[1]), dtype=torch.long)
    starts = range(0, len(text) - READ - PREDICTED - 1, (len(text) - READ - PREDICTED - 1) // (ROWS - 1))
    rows = torch.stack([text[s : s + READ + PREDICTED + 1] for s in list(starts)[:ROWS]])
    state, nats = read(model, rows[:, :READ], READ + PREDICTED), 0.0
    for t in range(READ, READ + PREDICTED):
        logits, state = model.step(rows[:, t : t + 1], state)
        nats += F.cross_entropy(logits[:, 0, :BYTES], rows[:, t + 1]).item()
    return nats / PREDICTED / math.log(2)


def prompt_time(model: LanguageModel, dense: LanguageModel, repeats: int = 3) -> float:
    """Time of a prompt of PROMPT tokens over that of the dense one, medians of runs that take turns."""
    tokens = torch.tensor(list(texts()[1][:PROMPT]), dtype=torch.long)[None]
    times: dict[str, list[float]] = {"this": [], "dense": []}
    for _ in range(repeats):
        for name, which in (("this", model), ("dense", dense)):
            start = time.perf_counter()
            which.prefill(tokens, which.init_state(1, PROMPT), logits=None)
            times[name].append(time.perf_counter() - start)
    return statistics.median(times["this"]) / statistics.median(times["dense"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs: Any = parser.add_subparsers(dest="verb", required=True)
    training, measuring = verbs.add_parser("train"), verbs.add_parser("measure")
    training.add_argument("--out", type=Path, required=True, help="folder of the model")
    training.add_argument("--steps", type=int, default=STEPS)
    training.add_argument("--seed", type=int, default=0)
    measuring.add_argument("model", type=Path)
    measuring.add_argument("--out", type=Path, default=FOLDER, help="folder of results.jsonl (default: docs/policies)")
    measuring.add_argument("--rows", type=int, default=QUESTIONED_ROWS, help="texts with planted facts")
    chosen = parser.parse_args()
    if chosen.verb == "train":
        train(chosen.out, chosen.steps, chosen.seed)
    else:
        measure(chosen.model, chosen.out, chosen.rows)
    return 0


if __name__ == "__main__":
    run(main)
