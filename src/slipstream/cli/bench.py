"""slipstream bench: how fast architectures read and write, and what they carry."""

from __future__ import annotations

import json

import typer

from slipstream.bench.config import BenchConfig
from slipstream.cli.settings import verb
from slipstream.core.files import write_text


def add(app: typer.Typer) -> None:
    verb(app, "bench", BenchConfig, run)


def run(config: BenchConfig) -> None:
    """Time architectures of equal size with random weights: reading a prompt, writing a token, training, bytes of state.

    Examples:

      slipstream bench --archs attention,mamba2,gated_deltanet --params 3M

      slipstream bench --archs "rwkv7; 3*kda, attention" --lengths 512,4096 --json
    """
    import torch
    from rich.console import Console

    from slipstream.bench.machine import describe, usable_cores
    from slipstream.bench.speed import measure, state_record
    from slipstream.models.language_model import language_model
    from slipstream.report.progress import Overall
    from slipstream.report.table import print_table

    torch.set_num_threads(config.threads or usable_cores())
    models = {arch: language_model(arch, params=config.params) for arch in config.archs}
    with Overall(Console(stderr=True, highlight=False)) as overall:

        def hear(share: float, text: str) -> None:
            overall.show(share, config.budget * (1 - share), {"timing": text})

        records = measure(models, config.lengths, config.contexts, config.budget, hear)
    sizes = sorted({*config.lengths, *config.contexts})
    records += [state_record(arch, model, sizes) for arch, model in models.items()]
    records.insert(0, {"kind": "setup", "archs": config.archs, "params": config.params, "machine": describe(measured=False)})
    lines = "".join(json.dumps(r) + "\n" for r in records)
    if config.out:
        write_text(config.out / "results.jsonl", lines)
    if config.as_json:
        typer.echo(lines, nl=False)
    else:
        print_table(records, Console(highlight=False))
