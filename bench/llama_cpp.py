#!/usr/bin/env python3
"""slipstream against llama.cpp on the same GGUF files: that both say the same, and how fast each reads and writes.

    pip install llama-cpp-python              any libllama will do: this one is compiled for ten minutes,
    npm install @node-llama-cpp/linux-x64     this one comes compiled, to node_modules here (or mac-arm64-metal, win-x64, ...)
    python bench/llama_cpp.py MODEL.gguf
    python bench/llama_cpp.py MODEL.gguf --dtype int8 --seconds 60
    python bench/llama_cpp.py MODEL.gguf --work "" --library /usr/local/lib/libllama.so

Both are given the beginning of a novel, in tokens: as long as llama.cpp is not in doubt between two, the likeliest must be one.
Then both are timed in turns, with as many threads, on the processor alone. llama.cpp multiplies quantised blocks by activations in
8 bits, which --dtype int8 does here; otherwise blocks that slipstream has no kernel for become float32 first.
"""

from __future__ import annotations

import argparse
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

import slipstream as ss
from slipstream.bench import speed
from slipstream.bench.bound import Ratio, begin, conclude, options, run, told
from slipstream.bench.timing import interleaved, ratio
from slipstream.core.errors import InputError
from slipstream.data.source import read_text
from slipstream.generate.stream import encode
from slipstream.models.language_model import LanguageModel

IN_DOUBT = (
    0.02  # of the largest logit, between its two likeliest: it multiplies quantised blocks by activations in 8 bits
)
INSTALL = "no llama.cpp: npm install @node-llama-cpp/linux-x64, pip install llama-cpp-python, or --library libllama.so"
FLOAT16 = 1  # in ggml's numbers
WORK = "prefill 512,decode 512"
QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)(lambda level, text, _: None)


class Parameters(ctypes.Structure):
    """llama_model_params or llama_context_params of any version: the sizes come first in the latter, and there is room."""

    _fields_ = (("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("further", c_int32 * 253))

    def be_exact(self) -> None:
        """A context's cache in float32, and attention without float16. Where these are said depends on the version: four settings
        that are -1, for what the model says, the last of them of attention, eight numbers, two pointers, both types of the cache.
        """
        words = list(self.further)
        flash = next((i for i in range(len(words)) if words[i : i + 4] == [-1] * 4), 0) + 3
        first = flash + 9 + (flash % 2) + 4  # a pointer begins at a whole multiple of 8 bytes
        if words[first : first + 2] != [FLOAT16] * 2:
            raise InputError("this llama.cpp has its settings in another order than is known here")
        self.further[flash] = self.further[first] = self.further[first + 1] = 0


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    )  # fmt: skip


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_load_all_from_path": (None, [c_char_p]),
    "llama_log_set": (None, [c_void_p, c_void_p]),
    "llama_model_default_params": (Parameters, []),
    "llama_context_default_params": (Parameters, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, Parameters]),
    "llama_init_from_model": (c_void_p, [c_void_p, Parameters]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_free": (None, [c_void_p]),
    "llama_model_free": (None, [c_void_p]),
}


def opened(path: Path | None) -> ctypes.CDLL:
    """libllama, silent, with its backends. Raises InputError with what to install when there is none."""
    found = [path] if path else sorted(candidates())
    if not found:
        raise InputError(INSTALL)
    try:
        library = ctypes.CDLL(str(found[-1]), ctypes.RTLD_GLOBAL)
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise InputError(f"{found[-1]} is no llama.cpp that can be used ({error})") from None
    library.llama_log_set(QUIET, None)
    library.ggml_backend_load_all_from_path(os.fsencode(found[-1].parent))
    return library


def candidates() -> Iterator[Path]:
    """Of the package for Python, and of the one for Node here."""
    package = find_spec("llama_cpp")
    if package and package.origin:
        yield from Path(package.origin).parent.glob("lib/*llama.*")
    for name in ("libllama*.so", "libllama*.dylib", "llama*.dll"):
        yield from (p for p in Path("node_modules/@node-llama-cpp").glob(f"*/bins/*/{name}") if "common" not in p.name)


class Theirs:
    """A file run by llama.cpp, on one sequence."""

    def __init__(
        self, library: ctypes.CDLL, path: Path, threads: int = 1, room: int = 512, exact: bool = False
    ) -> None:
        """room: of tokens. exact: to be compared, and not timed. Raises InputError when llama.cpp does not read the file."""
        self.library, self.at = library, 0
        self.model = library.llama_model_load_from_file(os.fsencode(path), library.llama_model_default_params())
        if not self.model:
            raise InputError(f"llama.cpp does not read {path}")
        about = library.llama_context_default_params()
        about.n_ctx = about.n_batch = room
        if exact:
            about.be_exact()
        self.context = library.llama_init_from_model(self.model, about)
        library.llama_set_n_threads(self.context, threads, threads)
        self.vocabulary = library.llama_model_get_vocab(self.model)

    def close(self) -> None:
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)

    def tokens(self, text: str) -> list[int]:
        raw = text.encode()
        room = (c_int32 * (len(raw) + 8))()
        return room[: self.library.llama_tokenize(self.vocabulary, raw, len(raw), room, len(room), True, True)]

    def forget(self) -> None:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        self.at = 0

    def read(self, tokens: Sequence[int], every: bool = False) -> np.ndarray:
        """Logits after the last token, or after each, from where it stands."""
        batch = self.library.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        asked = range(len(tokens)) if every else [len(tokens) - 1]
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, self.at + i, 1, i in asked
            batch.seq_id[i][0] = 0
        failed = self.library.llama_decode(self.context, batch)
        self.library.llama_batch_free(batch)
        if failed:
            raise InputError(f"llama.cpp gave up after {self.at} tokens (error {failed})")
        self.at += len(tokens)
        width = (self.library.llama_vocab_n_tokens(self.vocabulary),)
        rows = [np.ctypeslib.as_array(self.library.llama_get_logits_ith(self.context, i), width) for i in asked]
        return np.stack(rows)


@torch.no_grad()
def agreement(name: str, ours: LanguageModel, theirs: Theirs, tokens: Sequence[int]) -> Ratio:
    """How many tokens both find likeliest that are not the same, where llama.cpp is not in doubt; none may be."""
    mine, said = ours(torch.tensor([tokens]))[0].float().numpy(), theirs.read(tokens, every=True)
    largest, unlike = np.abs(said).max(), mine.argmax(-1) != said.argmax(-1)
    second, first = np.partition(said, -2)[:, -2:].T
    sure = unlike & (first - second > IN_DOUBT * largest)
    apart = np.abs(mine - said).max() / largest
    about = f"of {len(tokens)} likeliest tokens {unlike.sum()} differ, logits by {apart:.1e} of the largest"
    return Ratio(f"{name} likeliest", about, float(sure.sum()), 0)


def same_tokens(name: str, ours: LanguageModel, theirs: Theirs, text: str) -> Ratio:
    """Where the two tokenizers part, 0 when they do not."""
    mine, said = encode(ours, text), theirs.tokens(text)
    unlike = sum(a != b for a, b in zip(mine, said)) + abs(len(mine) - len(said))
    return Ratio(f"{name} tokens", f"{len(mine)} of {len(text)} characters", unlike, 0)


@torch.no_grad()
def against(name: str, work: str, ours: LanguageModel, theirs: Theirs, seconds: float) -> Ratio:
    """Our time over llama.cpp's."""
    kind, _, count = work.partition(" ")
    n, mine = int(count), {"prefill": speed.reading, "decode": speed.writing}[kind]
    their_work = {"prefill": their_reading, "decode": their_writing}[kind]
    found = interleaved({"ours": mine(ours, n), "theirs": their_work(theirs, ours, n)}, seconds, least=3)
    theirs.forget()
    tokens = {"prefill": n, "decode": speed.STEPS}[kind]
    paces = [f"{tokens / t.seconds:.0f} (busy {t.busy:.2f})" for t in (found["ours"], found["theirs"])]
    return Ratio(f"{name} {work}", f"{paces[0]} against {paces[1]} tokens/s", ratio(found["ours"], found["theirs"]), 1)


def their_reading(theirs: Theirs, ours: LanguageModel, count: int) -> Callable[[], object]:
    prompt = speed.random_tokens(ours, count).tolist()

    def once() -> None:
        theirs.forget()
        theirs.read(prompt)

    return once


def their_writing(theirs: Theirs, ours: LanguageModel, context: int) -> Callable[[], object]:
    """STEPS tokens after a context, which is read here, untimed."""
    theirs.read(speed.random_tokens(ours, context).tolist())
    return lambda: [theirs.read([1]) for _ in range(speed.STEPS)]


def main() -> int:
    parser = options(__doc__, seconds=20, threads=2)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("files", nargs="+", type=Path, help="GGUF files that both read")
    parser.add_argument("--dtype", help="of our weights: float32, int8, ...; as slipstream loads the file by default")
    parser.add_argument("--tokens", type=int, default=256, help="of the text that both are given")
    parser.add_argument("--work", default=WORK, help='what is timed; "" for nothing')
    parser.add_argument("--library", type=Path, help="libllama, where it is in neither package")
    arguments = parser.parse_args()
    begin(arguments)
    library = opened(arguments.library)
    found = [told(r, arguments) for file in arguments.files for r in ratios(library, file, arguments)]
    return conclude(found, arguments)


def ratios(library: ctypes.CDLL, file: Path, arguments: argparse.Namespace) -> Iterator[Ratio]:
    work = [w for w in arguments.work.split(",") if w]
    room = max([0, *(int(w.partition(" ")[2]) for w in work)]) + speed.KEPT_ROOM
    ours, theirs = (
        ss.load(file, arguments.dtype),
        Theirs(library, file, arguments.threads, arguments.tokens, exact=True),
    )
    tokens, name = speed.random_tokens(ours, arguments.tokens).tolist(), file.stem[:16]
    if ours.tokenizer is not None:
        text = read_text().content.decode("utf-8")[: 8 * arguments.tokens]
        yield same_tokens(name, ours, theirs, text)
        tokens = encode(ours, text)[: arguments.tokens]
    yield agreement(name, ours, theirs, tokens)
    theirs.close()
    theirs = Theirs(library, file, arguments.threads, room)
    for w in work:
        yield against(name, w, ours, theirs, arguments.seconds)
    theirs.close()


if __name__ == "__main__":
    run(main)
