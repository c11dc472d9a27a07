"""Write docs/policies.md and its picture from docs/policies/results.jsonl, which bench/cache_policies.py makes.

python docs/policies.py            write them
python docs/policies.py --check    say which are out of date, and fail
"""

from __future__ import annotations

from pathlib import Path

from pages import renew
from policies_figure import Point, figure

from slipstream.compare.results import Record, Results
from slipstream.core.quantities import bytes_in_words
from slipstream.policies.catalogue import PolicyCard, policy_cards

DOCS = Path(__file__).parent
FIGURE = "policies.svg"
HEAD = """# Cache and prefill policies: what they save, and what it costs

A policy changes how a trained model runs and none of its weights. A **cache policy** says what is kept of keys and values and
which of it a new token reads; a **prefill policy** says which keys the tokens of a prompt read.

```
slipstream generate RUN "..." --cache h2o:512 --prefill-policy minference
```

**What was measured.** One model (four layers of attention, width 128, no positions, a short convolution of width 4) learned
prose with facts planted in it, in rows of at most 1,000 tokens. It is asked, under every policy, for six facts that lie 4,000
tokens back (*recall*); *bytes* is what the state of one row then holds in float32, and *keys read* what a head compares with
to make one token. It predicts text that it has never seen behind a prompt of 704 tokens (*bits per byte*). *Prompt* is the
time of a prompt of 4,096 tokens over that of the dense one in the same run. The heads that keep everything under
`duo_attention` were found by `retrieval_heads` on the text that was learned from, a share of all eight key heads of the model;
the others keep their last 128 tokens.

**What it is not.** A small model that learned for minutes uses few of its heads for looking facts up; a large one spreads
them, which is easier on policies that drop tokens evenly and harder on those that trust a few heads. Facts are asked for
after all else was read: a policy that must choose what to keep before it sees the question has to guess, and that is what
is being shown. SnapKV above all was made for prompts that end with their question and come whole; here they come in pieces of
512 tokens, and the question after them.

Made by `python bench/cache_policies.py` and `python docs/policies.py`; do not edit.
"""


def page(records: list[Record]) -> str:
    caches = [r for r in records if r["prefill"] == "dense"]
    prompts = [r for r in records if r["cache"] == "full"]
    return "\n".join(
        [
            HEAD,
            f"![recall against bytes held and keys read]({FIGURE})\n",
            "## Cache policies\n",
            "| policy | recall | bits per byte | bytes | keys read |",
            "|---|---:|---:|---:|---:|",
            *(_cache_row(r) for r in caches),
            "\n## Prefill policies\n",
            "| policy | recall | bits per byte | prompt |",
            "|---|---:|---:|---:|",
            *(_prompt_row(r) for r in prompts),
            "\n## What each does\n",
            *map(_told, policy_cards()),
            "",
        ]
    )


def _recall(r: Record) -> str:
    return f"{100 * r['recall'][0] / r['recall'][1]:.0f} %"


def _cache_row(r: Record) -> str:
    kept = bytes_in_words(r["bytes"])
    return f"| `{r['cache']}` | {_recall(r)} | {r['bits_per_byte']:.3f} | {kept} | {r['keys_read']:,.0f} |"


def _prompt_row(r: Record) -> str:
    return f"| `{r['prefill']}` | {_recall(r)} | {r['bits_per_byte']:.3f} | {r['prompt_time']:.2f} |"


def _told(card: PolicyCard) -> str:
    takes = f", `{card.name}:` {card.takes}" if card.takes else ""
    return f"- **{card.name}** ({card.setting.removesuffix('_policy')}{takes}). {card.paper}."


def files() -> dict[Path, str]:
    records = sorted(Results(DOCS / "policies").records(), key=lambda r: (r["cache"].partition(":")[0], r["keys_read"]))
    points = [
        Point(r["cache"], r["bytes"], r["keys_read"], r["recall"][0] / r["recall"][1])
        for r in records
        if r["prefill"] == "dense"
    ]
    return {DOCS / "policies.md": page(records), DOCS / FIGURE: figure(points)}


if __name__ == "__main__":
    renew(files(), "python docs/policies.py")
