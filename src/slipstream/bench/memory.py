"""Peak memory of reading a prompt, in a process of its own: what the operating system saw, beyond the model just made.

The high-water mark of a process can only rise, so every reading is a fresh process; a short one before it sets the baseline.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from slipstream.models.config import ModelConfig

CHILD = """
import json, resource, sys, torch
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel
torch.set_num_threads(1)
config, tokens = json.load(sys.stdin)
model = LanguageModel(ModelConfig(**config)).eval()
read = lambda n: model.prefill(torch.zeros(1, n, dtype=torch.long), logits="last")
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    read(16)
    before = peak()
    read(tokens)
print(peak() - before)
"""


def peak_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes by which reading `tokens` tokens in one call raises the peak memory of a process. Unix only: uses getrusage."""
    order = json.dumps([config.model_dump(), tokens])
    done = subprocess.run([sys.executable, "-c", CHILD], input=order, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"reading {tokens} tokens failed: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout)


def memory_record(name: str, config: ModelConfig, lengths: list[int]) -> dict[str, Any]:
    """A record of kind "memory": peak [[tokens, bytes]]."""
    return {"kind": "memory", "arch": name, "peak": [[n, peak_bytes(config, n)] for n in sorted(lengths)]}
