"""What is exported runs in llama.cpp, and says the same: for every architecture, with a tokenizer.

Needs a libllama, which bench/llama_cpp.py says how to get; it is looked for as there, from the folder that pytest runs in.

    npm install @node-llama-cpp/linux-x64 && pytest -m slow tests/interop/test_gguf_llama_cpp.py
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from slipstream.generate.stream import encode
from slipstream.interop.gguf.write import save_gguf

from .test_gguf import THEIRS, theirs_and_ours, with_room_for_bytes

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "bench" / "llama_cpp.py"
TEXT = "It's naïve, 12345 times: 中文 😀\n\n\tThe end. "
CLOSE = 1e-5  # of the largest logit
ROUGHLY = 2e-3
LESS_CLOSE = ("gemma", "nemotron", "qwen3next", "deepseek")  # gelu of a table, unbounded steps, norms of another eps


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("llama_cpp_script", SCRIPT)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def library(script):
    return script.opened(None)


@pytest.mark.parametrize("case", THEIRS)
def test_llama_cpp_says_the_same(case, script, library, tmp_path):
    ours = with_room_for_bytes(theirs_and_ours(case, tmp_path)[1])
    save_gguf(ours, tmp_path / "a.gguf")
    theirs = script.Theirs(library, tmp_path / "a.gguf", exact=True)
    tokens = encode(ours, TEXT)
    assert theirs.tokens(TEXT) == tokens
    said = torch.from_numpy(theirs.read(tokens, every=True))
    with torch.no_grad():
        mine = ours(torch.tensor([tokens]))[0]
    assert (mine - said).abs().max() <= (ROUGHLY if case.startswith(LESS_CLOSE) else CLOSE) * said.abs().max()
    assert (mine.argmax(-1) == said.argmax(-1)).all()
    theirs.forget()
    stepwise = [theirs.read([token])[0] for token in tokens]
    assert (mine - torch.tensor(stepwise)).abs().max() <= ROUGHLY * said.abs().max()
    theirs.close()
