"""What the benchmarks on the ledger world run before they differ: from a base model to scored pairs, by seed.

Each stage is a script or a recipe with the command line that a user would type (tokalign/cli/stages.py prints and keeps
them); a killed benchmark goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from tokalign.cli.ledger_models import trained_model
from tokalign.cli.stages import Stages

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

LEDGER = "recipes/ledger"
MAX_TOKENS = 96


def models(base: str | None, eval_model: str | None) -> tuple[str, str]:
    """The ledger's weak base and the model that gives token rewards, from the cache (trained first) where not given."""
    return (
        base or str(trained_model("ledger-slm")),
        eval_model or str(trained_model("ledger-slm-revise", world=["--draft_share", "0.6"])),
    )


def stages_in(folder: Path) -> Stages:
    """The stages of a benchmark, kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return Stages(folder)


def build_pairs(stages: Stages, out: Path, base: str, *, problems: int, rollouts: int, seed: int) -> Path:
    """Problems of the train split, rollouts of the base, and pairs; the folder of the pairs."""
    world = out / "world"
    stages.run(
        *("problems", "data/ledger.py", "--output_dir", world, "--seed", seed),
        *("--train", problems, "--validation", 1, "--test", 1, "--sft", 1),
    )
    stages.run(
        *("rollouts", "scripts/sample_rollouts.py", "--model", base, "--dataset", world / "train"),
        *("--output_dir", out / "rollouts", "--num_rollouts", rollouts, "--max_tokens", MAX_TOKENS, "--seed", seed),
    )
    stages.run(
        *("pairs", "scripts/build_pairs.py", "--dataset", out / "rollouts"),
        *("--output_dir", out / "preferences", "--seed", seed),
    )
    return out / "preferences" / "pairs"


def score_token_rewards(stages: Stages, out: Path, model: str, dataset: Path) -> Path:
    """Self-generated token rewards of `model` on `dataset`; the folder of the scored stage."""
    stages.run(
        *("token rewards", "scripts/score.py", "token-reward", "--model", model, "--dataset", dataset),
        *("--templates", "ledger", "--output_dir", out / "rewarded"),
    )
    return out / "rewarded"


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds with its 95 % interval by Student's t, the values, and the p-value of a mean of 0.

    The p-value (two-sided) says something of differences only; like the interval it is null for a single seed.
    """
    n = len(values)
    mean = sum(values) / n
    found: dict[str, Any] = {"mean": mean, "ci95": [None, None], "seeds": n, "values": list(values), "p": None}
    if n > 1:
        error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
        spread = error * float(stats.t.ppf(0.975, n - 1))
        found["ci95"] = [mean - spread, mean + spread]
        found["p"] = 2 * float(stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return found


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """`over_seeds` of a − b: two methods on the same problems, pairs and seeds."""
    return over_seeds([x - y for x, y in zip(a, b, strict=True)])


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
