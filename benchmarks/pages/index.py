"""docs/results/README.md: the pages, with their verdicts counted."""

from __future__ import annotations

from collections.abc import Mapping

from pages.common import FAILS, HOLDS, OPEN, markdown_table


def index(pages: Mapping[str, str]) -> str:
    """The index of pages: name -> text."""
    rows = [
        [f"[{text.splitlines()[0].removeprefix('# ')}]({name}.md)"]
        + [str(text.count(f"**{word}**")) for word in (HOLDS, FAILS, OPEN)]
        for name, text in pages.items()
    ]
    lines = [
        "# Results",
        "",
        "What the four papers claim, in miniature, and what this package claims of itself: measured, with intervals, and a",
        "verdict row by row. `make benchmarks` makes all of it on a machine without a GPU, in hours; `make benchmarks-quick`",
        "shows in minutes that it runs. Every page is written from the runs' JSON in [data/](data); a test holds them equal.",
        "",
        *markdown_table(("page", HOLDS, FAILS, OPEN), rows),
        "",
        "*Holds*: the 95 % interval of the difference lies on the claim's side. *Does not hold*: on the other. *Cannot be told",
        "here*: across zero; the interval says how large an effect could have been missed. The intervals are one by one: of",
        "twenty claims that are false, one may seem to hold or to fail. These are models of 0.16 to 3 million parameters in a",
        "made-up world: whether an order is the same at 8B is for the recipes to show.",
        "",
        "## Words",
        "",
        "- *Ledger world*: generated word problems about a few numbers, solved in steps, whose first wrong token is known exactly",
        "  ([tokalign/worlds/ledger.py](../../tokalign/worlds/ledger.py)). *Greedy* and *sampled*: at temperature 0 and 1.",
        "- *SFT→DPO*: DPO that starts from the SFT model. *RPO*: DPO with the log-likelihood of the chosen answer added. *TDPO*: token-level",
        "  DPO with a KL term. *y_w*: the chosen answer. *w*: T-REG's weight of a pair. *r̂*: its token reward.",
        "- *pass@k*: at least one of k answers is right. *hit@1*: the token with the lowest score is the one looked for.",
        "- *LLM tokens*: the share of an answer's tokens that the large model wrote. *Query-level*: a whole problem goes to one model.",
        "",
    ]
    return "\n".join(lines)
