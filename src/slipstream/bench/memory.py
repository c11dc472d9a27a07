"""Peak memory of reading a prompt or of a training step, in a process of its own: what the kernel saw, beyond the model and
torch itself.

A short text is read first; then the kernel's high-water mark is set back to what is in use. getrusage will not do: its mark
cannot be set back, and a child begins with its parent's.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from slipstream.core.errors import InputError
from slipstream.models.config import ModelConfig

CHILD = """
import json, sys, torch
from pathlib import Path
from slipstream.models.config import ModelConfig
from slipstream.models.language_model import LanguageModel
torch.set_num_threads(1)
config, tokens, training = json.load(sys.stdin)
model = LanguageModel(ModelConfig(**config)).train(training)
status = lambda: dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
def read(n):
    text = torch.zeros(1, n, dtype=torch.long)
    if training:
        model(text).logsumexp(-1).mean().backward()
        model.zero_grad()
    else:
        with torch.no_grad():
            model.prefill(text, logits="last")
read(16)
Path("/proc/self/clear_refs").write_text("5")
before = status()["VmHWM"]
read(tokens)
print(1024 * (int(status()["VmHWM"].split()[0]) - int(before.split()[0])))
"""


def peak_bytes(config: ModelConfig, tokens: int, training: bool = False) -> int:
    """Bytes by which reading `tokens` tokens in one call, or training on them, raises a process's memory.

    Raises InputError where there is no /proc.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise InputError(
            f"peak memory is read from /proc, which {platform.system()} has not; leave memory out of --measure"
        )
    order = json.dumps([config.model_dump(), tokens, training])
    done = subprocess.run([sys.executable, "-c", CHILD], input=order, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"reading {tokens} tokens failed: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout)


def memory_record(name: str, config: ModelConfig, lengths: list[int]) -> dict[str, Any]:
    """A record of kind "memory": peak [[tokens, bytes]]."""
    return {"kind": "memory", "arch": name, "peak": [[n, peak_bytes(config, n)] for n in sorted(lengths)]}
