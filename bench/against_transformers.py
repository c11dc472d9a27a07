"""Prefill of 2048 tokens against transformers' classes of the same shape, float32, all threads, in one run.

    python bench/against_transformers.py            about 125M parameters; at least as fast, or exit 1
    python bench/against_transformers.py --small    about 10M, to try the script

Gated DeltaNet against Qwen3NextForCausalLM with linear-attention layers only, Mamba-2 against Mamba2ForCausalLM, both in
the form transformers runs on a CPU. Logits of the last token only, on both sides; theirs keep no state, since Qwen3-Next
refuses a cache without attention layers. Interleaved; ratios of medians; CPU time
over wall time shows whether the machine was disturbed (2.0 is two threads at work).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

import slipstream as ss

TOKENS, REPEATS, VOCAB = 2048, 5, 32000
SIZES = {"full": {"d": 768, "gdn_layers": 12, "mamba_layers": 24}, "small": {"d": 256, "gdn_layers": 4, "mamba_layers": 4}}


def gated_deltanet(d: int, layers: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Heads of 128 with twice as many value heads, as Qwen3-Next has them, and a SwiGLU of 8/3 d."""
    heads, d_ff = d // 128, d * 8 // 3
    theirs = Qwen3NextForCausalLM(
        Qwen3NextConfig(
            vocab_size=VOCAB, hidden_size=d, intermediate_size=d_ff, num_hidden_layers=layers, num_attention_heads=d // 64,
            num_key_value_heads=d // 64, head_dim=64, linear_num_key_heads=heads, linear_num_value_heads=2 * heads,
            linear_key_head_dim=128, linear_value_head_dim=128, layer_types=["linear_attention"] * layers,
            mlp_only_layers=list(range(layers)), tie_word_embeddings=True,
        )
    )
    pattern = f"gated_deltanet(n_heads={heads}, n_v_heads={2 * heads}, head_dim=128)/swiglu(d_ff={d_ff})"
    return ss.language_model(pattern, n_layers=layers, d_model=d, vocab_size=VOCAB), theirs


def mamba2(d: int, layers: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Inner width 2 d, heads of 64, state 128, no feed-forward."""
    theirs = Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=VOCAB, hidden_size=d, num_hidden_layers=layers, state_size=128, head_dim=64, num_heads=2 * d // 64,
            expand=2, n_groups=1, tie_word_embeddings=True,
        )
    )
    return ss.language_model("mamba2/none", n_layers=layers, d_model=d, vocab_size=VOCAB), theirs


@torch.no_grad()
def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall time, and of CPU time over it."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall, cpu / wall


def compare(name: str, ours: torch.nn.Module, theirs: torch.nn.Module) -> float:
    """Their median time over ours: above 1, ours is faster."""
    tokens = torch.randint(VOCAB, (1, TOKENS))
    ours, theirs = ours.eval(), theirs.eval()
    runs = {"ours": lambda: ours.prefill(tokens), "theirs": lambda: theirs(tokens, use_cache=False, logits_to_keep=1)}
    for run in runs.values():
        timed(run)
    times = {who: [] for who in runs}
    for _ in range(REPEATS):
        for who, run in runs.items():
            times[who].append(timed(run))
    for who, model in (("ours", ours), ("theirs", theirs)):
        walls = [w for w, _ in times[who]]
        size, busy = sum(p.numel() for p in model.parameters()), statistics.median(c for _, c in times[who])
        spread = f"from {TOKENS / max(walls):.0f} to {TOKENS / min(walls):.0f}; CPU/wall {busy:.2f}"
        print(f"{name:16}{who:8}{size / 1e6:7.1f}M{TOKENS / statistics.median(walls):9.0f} tokens/s  ({spread})", flush=True)
    medians = {who: statistics.median(w for w, _ in t) for who, t in times.items()}
    return medians["theirs"] / medians["ours"]


def main(size: str) -> int:
    torch.manual_seed(0)
    s = SIZES[size]
    ratios = {
        "gated_deltanet": compare("gated_deltanet", *gated_deltanet(s["d"], s["gdn_layers"])),
        "mamba2": compare("mamba2", *mamba2(s["d"], s["mamba_layers"])),
    }
    print(json.dumps({"times_as_fast": {k: round(r, 2) for k, r in ratios.items()}, "threads": torch.get_num_threads()}))
    return any(r < 1 for r in ratios.values())


if __name__ == "__main__":
    sys.exit(main("small" if "--small" in sys.argv else "full"))
