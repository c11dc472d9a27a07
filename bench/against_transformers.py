#!/usr/bin/env python3
"""Reading a prompt of 2048 tokens is at least as fast as in transformers' models of the same shape: about 125M parameters,
float32, two threads, on a CPU, where both run what torch offers (transformers' own kernels need CUDA).

Ours keeps the state it ends with; theirs is spared that (its cache refuses a stack without any attention).

    pip install transformers && python bench/against_transformers.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import nn

from slipstream.bench.bound import Ratio, begin, conclude, options, told
from slipstream.bench.speed import random_tokens
from slipstream.bench.timing import interleaved, ratio
from slipstream.models.language_model import LanguageModel, language_model

D_MODEL, HEAD_DIM, VOCABULARY = 768, 64, 32000
BOUND = 1.0


def main() -> int:
    parser = options(__doc__, seconds=60, threads=2)
    parser.add_argument("--archs", default=",".join(PAIRS), help="which pairs")
    parser.add_argument("--tokens", type=int, default=2048, help="of the prompt")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than about 125M parameters have; 0 for all")
    arguments = parser.parse_args()
    begin(arguments)
    found = [against(a, arguments.tokens, arguments.layers, arguments.seconds) for a in arguments.archs.split(",")]
    return conclude([told(r, arguments) for r in found], arguments)


@torch.no_grad()
def against(name: str, tokens: int, n_layers: int, seconds: float) -> Ratio:
    """Our time over theirs."""
    ours, theirs = (m.eval() for m in PAIRS[name](n_layers))
    prompt = random_tokens(ours, 1, tokens)
    work: dict[str, Callable[[], object]] = {
        "ours": lambda: ours.prefill(prompt, logits="last"),
        "theirs": lambda: theirs(prompt, use_cache=False, logits_to_keep=1),
    }
    found = interleaved(work, seconds, least=3)
    sizes = " and ".join(f"{sum(p.numel() for p in m.parameters()) / 1e6:.0f}M" for m in (ours, theirs))
    took = f"{found['ours'].seconds:.2f} s over {found['theirs'].seconds:.2f} s, {sizes} parameters"
    return Ratio(f"{name} / {type(theirs).__name__}", took, ratio(found["ours"], found["theirs"]), BOUND)


def gated_deltanet(n_layers: int) -> tuple[LanguageModel, nn.Module]:
    """With SwiGLU, as in Qwen3.5, whose every fourth layer would be attention: here none is."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    n_layers, heads, d_ff = n_layers or 12, D_MODEL // HEAD_DIM, 2304
    ours = language_model("gated_deltanet", n_layers=n_layers, d_model=D_MODEL, vocab_size=VOCABULARY, d_ff=d_ff)
    config = Qwen3_5TextConfig(
        vocab_size=VOCABULARY, hidden_size=D_MODEL, intermediate_size=d_ff, num_hidden_layers=n_layers,
        linear_num_key_heads=heads, linear_num_value_heads=heads, linear_key_head_dim=HEAD_DIM, linear_value_head_dim=HEAD_DIM,
        layer_types=["linear_attention"] * n_layers, tie_word_embeddings=True,
    )  # fmt: skip
    return ours, Qwen3_5ForCausalLM(config)


def mamba2(n_layers: int) -> tuple[LanguageModel, nn.Module]:
    """As mamba2-130m: no feed-forward."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    n_layers = n_layers or 24
    ours = language_model("mamba2/none", n_layers=n_layers, d_model=D_MODEL, vocab_size=VOCABULARY)
    config = Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=D_MODEL, num_hidden_layers=n_layers, state_size=128, expand=2, head_dim=HEAD_DIM,
        num_heads=2 * D_MODEL // HEAD_DIM, n_groups=1, chunk_size=256, tie_word_embeddings=True,
    )  # fmt: skip
    return ours, Mamba2ForCausalLM(config)


def mamba(n_layers: int) -> tuple[LanguageModel, nn.Module]:
    """As mamba-130m: no feed-forward."""
    from transformers import MambaConfig, MambaForCausalLM

    n_layers = n_layers or 24
    ours = language_model("mamba/none", n_layers=n_layers, d_model=D_MODEL, vocab_size=VOCABULARY)
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=D_MODEL, num_hidden_layers=n_layers, state_size=16, expand=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return ours, MambaForCausalLM(config)


PAIRS = {"gated_deltanet": gated_deltanet, "mamba2": mamba2, "mamba": mamba}

if __name__ == "__main__":
    sys.exit(main())
