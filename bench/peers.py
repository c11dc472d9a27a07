#!/usr/bin/env python3
"""slipstream against transformers' classes of the same shape and the same weights, and against the machine itself.

About 120M parameters, float32, batch 1, two threads of a CPU, where both run without a GPU's kernels. Their weights are drawn at
random, saved as a Hugging Face folder, and read by slipstream: both compute one function, which is checked first. Times are
medians of runs that take turns; "busy" is CPU time over wall time, which is below the number of threads where other work had a
core. The limits are those of the machine, measured in the same run: what its matrix products take for as many operations, and
what it takes to read as many bytes.

    pip install transformers mambapy && python bench/peers.py
    python bench/peers.py --peers mamba --work "prefill 2048" --seconds 60
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slipstream as ss
from slipstream.bench.bound import Ratio, begin, conclude, options, run, told
from slipstream.bench.machine import matmul_rate, read_rate
from slipstream.bench.speed import STEPS, random_tokens, reading, writing
from slipstream.bench.timing import Timing, interleaved, ratio
from slipstream.models.language_model import LanguageModel

D_MODEL, HEAD_DIM, VOCABULARY, D_FF = 768, 64, 32000, 2304
HEADS = D_MODEL // HEAD_DIM
TRAINING = (4, 1024)  # sequences and tokens
LARGE = 4096  # rows and columns of the product that the machine's rate is measured with
AGREE = 1e-3  # of the largest logit, between two float32 programs
PREFILL_LIMIT, DECODE_LIMIT = 1.35, 1.25

# how many times as fast as theirs it is meant to be; what is not here, as fast
MEANT: dict[tuple[str, str], float] = {
    ("mamba", "prefill 2048"): 5, ("mamba2", "prefill 2048"): 3, ("qwen3_5", "prefill 2048"): 1.3,
    ("rwkv", "prefill 2048"): 2, ("xlstm", "prefill 2048"): 2,
    ("mamba", "train"): 5, ("mamba2", "train"): 2, ("qwen3_5", "train"): 1.5,
    **{(peer, "decode 512"): 2 for peer in ("mamba", "mamba2", "qwen3_5", "rwkv", "llama", "lfm2", "recurrent_gemma")},
}  # fmt: skip
QUANTISED = {"int8": 3, "int4": 4.5}  # times as fast a token as in float32
WORK = ("prefill 512", "prefill 2048", "prefill 8192", "decode 512", "decode 8192", "train")
LINEAR = (
    "gated_deltanet", "deltanet", "kda", "rwkv7", "mamba2", "mamba", "gated_linear_attention", "retnet", "rwkv4", "rwkv6",
    "hgrn2", "linear_transformer", "mlstm", "rg_lru", "lru", "hgrn", "mingru", "s5",
)  # fmt: skip


def main() -> int:
    parser = options(__doc__, seconds=20, threads=2)
    there = [name for name in PEERS if name != "mambapy" or find_spec(name)]
    parser.add_argument("--peers", default=",".join(there), help='which classes; "" for none')
    parser.add_argument("--work", default="prefill 512,prefill 2048,decode 512,train", help=f"of {', '.join(WORK)}")
    parser.add_argument("--mixers", default=",".join(LINEAR), help='held to the matrix-product limit; "" for none')
    parser.add_argument(
        "--quantised", default="qwen3_5", help='peers whose tokens are timed in int8 and int4; "" for none'
    )
    parser.add_argument(
        "--dense", action="store_true", help="8192 tokens of gated_deltanet against a dense transformer's"
    )
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than about 120M parameters have; 0 for all")
    arguments = parser.parse_args()
    begin(arguments)
    found = [told(r, arguments) for r in all_ratios(arguments)]
    return conclude(found, arguments)


def all_ratios(arguments: argparse.Namespace) -> Iterator[Ratio]:
    rates = matmul_rate(LARGE), read_rate(2**30)
    if not arguments.json:
        print(
            f"this machine: {rates[0] / 1e9:.0f} GFLOP/s of products, {rates[1] / 1e9:.1f} GB/s of reading", flush=True
        )
    for name in filter(None, arguments.peers.split(",")):
        theirs = PEERS[name](arguments.layers)
        ours = read_by_slipstream(theirs)
        yield agreement(name, ours, theirs)
        for work in arguments.work.split(","):
            yield from against(name, work, ours, theirs, rates, arguments.seconds)
        if name in arguments.quantised.split(","):
            yield from quantised(name, ours, arguments.seconds)
    for name in filter(None, arguments.mixers.split(",")):
        yield products_only(name, arguments.layers, rates[0], arguments.seconds)
    if arguments.dense:
        yield dense(arguments.layers, arguments.seconds)


def read_by_slipstream(theirs: nn.Module) -> LanguageModel:
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return ss.load(folder)


@torch.no_grad()
def agreement(name: str, ours: LanguageModel, theirs: nn.Module) -> Ratio:
    """That both are one function: the largest difference of logits over the largest logit."""
    tokens = random_tokens(ours, 1, 200)
    a, b = ours(tokens), theirs(tokens).logits
    sizes = " and ".join(f"{sum(p.numel() for p in m.parameters()) / 1e6:.0f}M" for m in (ours, theirs))
    return Ratio(
        f"{name} logits",
        f"{type(theirs).__name__}, {sizes} parameters",
        float((a - b).abs().max() / b.abs().max()),
        AGREE,
    )


def against(
    name: str, work: str, ours: LanguageModel, theirs: nn.Module, rates: tuple[float, float], seconds: float
) -> Iterator[Ratio]:
    """Our time over theirs; and over the limit, where one is promised."""
    kind, _, tokens = work.partition(" ")
    with torch.set_grad_enabled(kind == "train"):
        a, b = OURS[kind](ours, int(tokens or 0)), THEIRS[kind](theirs, int(tokens or 0))
        found = interleaved({"ours": a, "theirs": b} if b else {"ours": a}, seconds, least=3)
    mine = found["ours"]
    if b:
        meant = MEANT.get((name, work), 1)
        said = (
            f"{pace(mine, kind, tokens)} against {pace(found['theirs'], kind, tokens)} tokens/s, meant {meant:g} times"
        )
        yield Ratio(f"{name} {work}", said, ratio(mine, found["theirs"]), 1 / meant)
    if work == "prefill 2048":
        yield Ratio(
            f"{name} {work} / products",
            pace(mine, kind, tokens),
            mine.seconds / (products(ours, 2048) / rates[0]),
            PREFILL_LIMIT,
        )
    if work == "decode 512":
        limit = ours.bytes_per_token(512) / rates[1]
        yield Ratio(f"{name} {work} / reading", pace(mine, kind, tokens), mine.seconds / STEPS / limit, DECODE_LIMIT)


def pace(timing: Timing, kind: str, tokens: str) -> str:
    """Tokens a second, how far they scatter, and how many cores were busy."""
    done = {"prefill": int(tokens or 0), "decode": STEPS, "train": TRAINING[0] * TRAINING[1]}[kind]
    return f"{done / timing.seconds:.0f} (±{100 * timing.spread / timing.seconds:.0f} %, busy {timing.busy:.2f})"


def products(model: LanguageModel, tokens: int) -> float:
    """Operations of all matrix products of a prompt; the head is asked once."""
    return sum(m.cost(tokens, 1, "prefill").flops for m in model.stack.mixers()) + 2.0 * model.head.proj.weight.numel()


@torch.no_grad()
def quantised(name: str, ours: LanguageModel, seconds: float) -> Iterator[Ratio]:
    """A token in few bits over one in float32."""
    models = {"float32": ours} | {to: ss.quantise(ours, to) for to in QUANTISED}
    found = interleaved({to: writing(m, 512) for to, m in models.items()}, seconds, least=3)
    for to, meant in QUANTISED.items():
        said = f"{pace(found[to], 'decode', '')} against {pace(found['float32'], 'decode', '')} tokens/s, meant {meant:g} times"
        yield Ratio(f"{name} {to} decode", said, ratio(found[to], found["float32"]), 1 / meant)


@torch.no_grad()
def products_only(name: str, layers: int, rate: float, seconds: float) -> Ratio:
    """A prompt of 2048 tokens over what the machine takes for its matrix products."""
    feedforward = {"mamba": "/none", "mamba2": "/none", "rwkv4": "/rwkv_channel_mix"}.get(name, "")
    model = ss.language_model(name + feedforward, n_layers=layers or 6, d_model=D_MODEL, vocab_size=256).eval()
    mine = interleaved({name: reading(model, 2048)}, seconds / 4, least=3)[name]
    return Ratio(
        f"{name} / products",
        pace(mine, "prefill", "2048"),
        mine.seconds / (products(model, 2048) / rate),
        PREFILL_LIMIT,
    )


@torch.no_grad()
def dense(layers: int, seconds: float) -> Ratio:
    """8192 tokens of gated_deltanet over those of a transformer of equal parameters, by torch's own attention."""
    theirs = llama(layers)
    size = sum(p.numel() for p in theirs.parameters())
    ours = ss.language_model(
        "gated_deltanet", params=size, d_model=D_MODEL, vocab_size=VOCABULARY, tie_embeddings=True
    ).eval()
    found = interleaved({"ours": reading(ours, 8192), "theirs": their_reading(theirs, 8192)}, seconds, least=3)
    said = f"{pace(found['ours'], 'prefill', '8192')} against {pace(found['theirs'], 'prefill', '8192')} tokens/s"
    return Ratio("gated_deltanet 8192 / LlamaForCausalLM", said, ratio(found["ours"], found["theirs"]), 0.5)


def training(model: nn.Module, logits_of: Callable[[Tensor], Tensor]) -> Callable[[], object]:
    """Forward and backward of one batch."""
    tokens = random_tokens(model, *TRAINING)

    def once() -> None:
        logits = logits_of(tokens)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        model.zero_grad(set_to_none=True)

    return once


def their_training(model: nn.Module, _: int) -> Callable[[], object]:
    return training(model, lambda tokens: model(tokens, use_cache=False).logits)


def their_reading(model: nn.Module, tokens: int) -> Callable[[], object]:
    """They keep no cache here, which spares them work."""
    prompt, last = random_tokens(model, 1, tokens), {} if type(model).__name__ in WHOLE else {"logits_to_keep": 1}
    return lambda: model(prompt, use_cache=False, **last)


def their_writing(model: nn.Module, tokens: int) -> Callable[[], object] | None:
    """None where their own cached step fails."""
    out = model(random_tokens(model, 1, tokens), use_cache=True)
    names = [n for n in ("past_key_values", "cache_params", "state") if out.get(n) is not None]
    held: dict[str, Any] = {n: out[n] for n in names}
    token = random_tokens(model, 1, 1)

    def once() -> None:
        for _ in range(STEPS):
            out = model(token, use_cache=True, **held)
            held.update({n: out[n] for n in names})

    try:
        once()
    except (ValueError, RuntimeError, TypeError):
        return None
    return once


OURS: dict[str, Callable[[LanguageModel, int], Callable[[], object]]] = {
    "prefill": reading, "decode": writing, "train": lambda model, _: training(model, model)
}  # fmt: skip
THEIRS: dict[str, Callable[[nn.Module, int], Callable[[], object] | None]] = {
    "prefill": their_reading, "decode": their_writing, "train": their_training
}  # fmt: skip
WHOLE = {"RwkvForCausalLM", "xLSTMForCausalLM"}  # give all logits, whatever is asked


def built(name: str, **fields: Any) -> nn.Module:
    """transformers' model with random weights. Its notes on kernels that are not there are about GPUs."""
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="transformers")
    torch.manual_seed(0)
    config = getattr(transformers, fields.pop("config"))(vocab_size=VOCABULARY, tie_word_embeddings=True, **fields)
    return getattr(transformers, f"{name}ForCausalLM")(config).float().eval()


def mamba(layers: int, **fields: Any) -> nn.Module:
    sizes = {"hidden_size": D_MODEL, "num_hidden_layers": layers or 24, "state_size": 16}
    return built("Mamba", config="MambaConfig", **sizes, **fields)


def mambapy(layers: int) -> nn.Module:
    """The same by the parallel scan of that package, where theirs has a loop without it."""
    return mamba(layers, use_mambapy=True)


def mamba2(layers: int) -> nn.Module:
    sizes = {"head_dim": HEAD_DIM, "num_heads": 2 * HEADS, "state_size": 128, "n_groups": 1, "chunk_size": 256}
    return built("Mamba2", config="Mamba2Config", hidden_size=D_MODEL, num_hidden_layers=layers or 24, **sizes)


def qwen3_5(layers: int) -> nn.Module:
    """Three layers of gated delta net to one of attention."""
    linear = {
        f"linear_{n}": v
        for n, v in {"num_key_heads": HEADS, "num_value_heads": HEADS, "key_head_dim": HEAD_DIM}.items()
    }
    sizes = {"hidden_size": D_MODEL, "intermediate_size": D_FF, "num_hidden_layers": layers or 12, "head_dim": HEAD_DIM}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "linear_value_head_dim": HEAD_DIM}
    return built("Qwen3_5", config="Qwen3_5TextConfig", **linear, **sizes, **heads)


def rwkv(layers: int) -> nn.Module:
    return built("Rwkv", config="RwkvConfig", hidden_size=D_MODEL, num_hidden_layers=layers or 12, context_length=8192)


def xlstm(layers: int) -> nn.Module:
    return built("xLSTM", config="xLSTMConfig", hidden_size=D_MODEL, num_hidden_layers=layers or 12, num_heads=4)


def llama(layers: int) -> nn.Module:
    sizes = {"hidden_size": D_MODEL, "intermediate_size": D_FF, "num_hidden_layers": layers or 14}
    return built("Llama", config="LlamaConfig", num_attention_heads=HEADS, max_position_embeddings=16384, **sizes)


def lfm2(layers: int) -> nn.Module:
    """Two layers of short convolution to one of attention."""
    kinds = ["full_attention" if i % 3 == 2 else "conv" for i in range(max(3, layers or 14))]
    sizes = {"hidden_size": D_MODEL, "intermediate_size": 3 * D_MODEL, "num_hidden_layers": len(kinds)}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": 4}
    return built("Lfm2", config="Lfm2Config", layer_types=kinds, **heads, **sizes)


def recurrent_gemma(layers: int) -> nn.Module:
    sizes = {"hidden_size": D_MODEL, "intermediate_size": 2 * D_FF, "num_hidden_layers": layers or 12}
    return built("RecurrentGemma", config="RecurrentGemmaConfig", num_attention_heads=HEADS, lru_width=D_MODEL, **sizes)


PEERS: dict[str, Callable[[int], nn.Module]] = {
    f.__name__: f for f in (mamba, mamba2, qwen3_5, rwkv, xlstm, llama, lfm2, recurrent_gemma, mambapy)
}

if __name__ == "__main__":
    run(main)
