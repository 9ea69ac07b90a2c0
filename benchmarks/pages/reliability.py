"""docs/results/reliability.md: what kills, damaged files and half-written checkpoints cost (nothing, it is hoped)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pages.common import FAILS, HOLDS, OPEN, Run, header, markdown_table

NEEDS = ("reliability",)
INTRO = """What this package claims of itself, with no paper behind it: a job that is killed at any instant and started again
with the same command ends with the rows of one that nobody disturbed, and no damaged file passes for data. Every job of `scripts/`
and a dataset builder are killed with SIGKILL and resumed, a training likewise, every other kill aimed at the writing of a checkpoint; shards
get single bits flipped, are cut short, emptied and exchanged. The models are small and untrained: what is tested is the machinery."""
KINDS = {
    "mismatches": "other rows",
    "duplicates": "twice",
    "missing": "missing",
    "manifests": "manifests",
    "files": "files",
    "leftovers": "leftovers",
}


def page(runs: dict[str, Run]) -> str:
    results = runs["reliability"]["results"]
    lines = header("Reliability", INTRO, runs)
    lines += ["## Claims", "", *_claims(results), "", "## Jobs", "", *_jobs(results["jobs"]), ""]
    lines += ["## Shards", "", *_shards(results["shards"]), ""]
    if "training" in results:
        lines += ["## Training", "", *_training(results["training"]), ""]
    lines += [
        "## What else is held by tests",
        "",
        "`tests/faults/` runs the same kills in small, and: a disk that is full (a small real file system, and a limit on the",
        "size of files), one of two processes that dies under `accelerate launch`, two runs started on one folder, and servers",
        "that answer 500, hang, hang up without a byte, or send half a line, half an answer or half an event of a stream.",
        "",
    ]
    return "\n".join(lines)


def highest_rate(events: int) -> float:
    """Highest chance of a failure an event that 95 of 100 such series without any failure would still rule out."""
    return 1 - 0.05 ** (1 / events)


def _verdict(failures: int, events: int) -> str:
    return f"**{OPEN if not events else FAILS if failures else HOLDS}**"


def _claims(results: dict[str, Any]) -> list[str]:
    jobs, shards = results["jobs"].values(), results["shards"]
    kills, struck = sum(job["kills"] for job in jobs), sum(job["struck"] for job in jobs)
    wrong = sum(job[kind] for job in jobs for kind in KINDS)
    noticed = sum(bool(kind["said"]) and kind["same_after_rerun"] for kind in shards["kinds"].values())
    rows = [
        [
            "A job killed at any instant and started again equals one never killed",
            f"{wrong} differences after {kills} kills, {struck} of them while the job held its folder{_bound(wrong, struck)}",
            _verdict(wrong, struck),
        ],
        [
            "No flipped bit of a shard is read as another value",
            f"{shards['wrong']} of {shards['flips']} accepted{_bound(shards['wrong'], shards['flips'])}",
            _verdict(shards["wrong"], shards["flips"]),
        ],
        [
            "A damaged shard is refused by its readers, and a rerun computes it again",
            f"{noticed} of {len(shards['kinds'])} kinds of damage",
            _verdict(len(shards["kinds"]) - noticed, len(shards["kinds"])),
        ],
    ]
    if "training" in results:
        found = results["training"]
        rows.append(
            [
                "A training killed at any instant and resumed ends with the same weights, bit for bit",
                f"{found['different_weights']} of {found['runs']} runs differ after {found['kills']} kills, "
                f"{found['while_saving']} of them while a checkpoint was written",
                _verdict(found["different_weights"], found["kills"]),
            ]
        )
    return markdown_table(("claim", "here", "verdict"), rows)


def _bound(failures: int, events: int) -> str:
    """With no failure, the rate that the number of events still leaves possible."""
    return "" if failures or not events else f"; at most {100 * highest_rate(events):.1f} % fail (95 %)"


def _jobs(jobs: dict[str, Any]) -> list[str]:
    keys = ("rows", "shards", "undisturbed_seconds", "kills", "struck", "runs", *KINDS)
    rows = [[f"`{name}`", *(f"{found[key]:,}" for key in keys)] for name, found in jobs.items()]
    return [
        "*Struck*: the kill came while the job held its output folder (a lock, seen from outside at that instant); the others came",
        "while it imported, loaded a model or ended. *Folders*: runs that were finished in the end and compared. Then what differed:",
        "rows that the undisturbed run has not (or another order), rows twice, rows missing, manifests (counts, drops, parameters),",
        "other files byte by byte (features, answer files), and temporary files left over.",
        "",
        *markdown_table(
            ("job", "rows", "shards", "s undisturbed", "kills", "struck", "folders", *KINDS.values()),
            rows,
        ),
    ]


def _shards(shards: dict[str, Any]) -> list[str]:
    flips, plain = shards["flips"], shards["plain_wrong"]
    bits = markdown_table(
        ("one flipped bit", "found", "no effect on a value", "read as another value"),
        [
            ["a shard of this package"] + [str(shards[key]) for key in ("found", "harmless", "wrong")],
            ["the same rows as plain parquet"]
            + [str(shards[f"plain_{key}"]) for key in ("found", "harmless", "wrong")],
        ],
    )
    kinds = [
        [kind, found["said"] or "nothing", "yes" if found["same_after_rerun"] else "no"]
        for kind, found in shards["kinds"].items()
    ]
    return [
        f"Parquet has checksums of its pages, but writers leave them out and readers do not ask: of {flips} single bits flipped",
        f"in a plain file, {plain} ({100 * plain / flips:.0f} %) were read as other values without a word. Shards of this package carry",
        "the checksums and a digest of their own footer; `load_stage` and a resumed job check both.",
        "",
        *bits,
        "",
        "![Flipped bits](figures/reliability_flips.png)",
        "",
        *markdown_table(("damage", "`load_stage` says", "rows right after a rerun"), kinds),
    ]


def _training(found: dict[str, Any]) -> list[str]:
    return [
        f"Critical-token DPO of all weights, {found['steps']} steps, a checkpoint every {found['save_steps']}, always started with",
        "`--resume_from_checkpoint true`. transformers resumes from the folder with the highest step, whole or not; after",
        f"{found['stock_resume_fails']} of the {found['kills']} kills that folder was half written, and the resume would have failed there.",
        "The recipes choose the last checkpoint that is whole (`tokalign/trainers/checkpoints.py`).",
    ]


def figures(runs: dict[str, Run], folder: Path) -> None:
    shards = runs["reliability"]["results"]["shards"]
    figure = Figure(figsize=(7, 2.4), layout="constrained")
    axis = figure.subplots()
    names, left = ("plain parquet", "this package"), [0.0, 0.0]
    for key, label, colour in (
        ("found", "found", "tab:green"),
        ("harmless", "no effect on a value", "lightgrey"),
        ("wrong", "read as another value", "tab:red"),
    ):
        shares = [100 * shards[f"plain_{key}"] / shards["flips"], 100 * shards[key] / shards["flips"]]
        axis.barh(names, shares, left=left, label=label, color=colour)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axis.set_xlabel(f"% of {shards['flips']} single flipped bits")
    axis.set_xlim(0, 100)
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(folder / "reliability_flips.png", dpi=110)
