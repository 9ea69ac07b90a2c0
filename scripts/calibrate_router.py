r"""Choose a trained router's threshold for a budget, on held-out responses, and store it in the router's config.json.

python scripts/calibrate_router.py --router runs/router --dataset runs/labels/labels/calibration --target_rate 0.12 \
    --test runs/labels/labels/test

Exactly one target: `target_rate` (largest share of tokens that go to the large model), `target_recall` (least share of
divergent tokens that do) or `target_accuracy` (least share of responses all of whose divergent tokens do). The weights
are left as they are. `--test` prints what the router does on a split that nothing was chosen on, and writes it to
report.json and report.png; without a target it reports the threshold that is stored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from trl import TrlParser

from tokalign.routing.router.calibration import calibrate_router, report_on
from tokalign.routing.router.features import RouterDataset
from tokalign.routing.router.metrics import print_report
from tokalign.routing.router.model import TokenRouter
from tokalign.stage.processes import process_state

TARGETS = ("target_rate", "target_recall", "target_accuracy")


@dataclass
class CalibrateRouterArguments:
    """Arguments of router calibration."""

    router: str = field(metadata={"help": "Folder of the router, which gets the threshold."})
    dataset: str | None = field(default=None, metadata={"help": "Held-out labels to choose on: …/labels/calibration."})
    target_rate: float | None = field(default=None, metadata={"help": "Largest share of tokens that may be routed."})
    target_recall: float | None = field(default=None, metadata={"help": "Least share of divergent tokens routed."})
    target_accuracy: float | None = field(
        default=None, metadata={"help": "Least share of responses all of whose divergent tokens are routed."}
    )
    test: str | None = field(default=None, metadata={"help": "Labels to report on: …/labels/test."})
    slm: str | None = field(default=None, metadata={"help": "The small model; default: the router's own record."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder of the report; default: the router's."})
    batch_size: int = field(default=4096, metadata={"help": "Tokens scored at a time."})
    samples: int = field(default=1000, metadata={"help": "Bootstrap resamples of responses."})


def main(arguments: CalibrateRouterArguments) -> dict[str, Any] | None:
    """Calibrate and report; the report, None without `test`."""
    target = {name: getattr(arguments, name) for name in TARGETS if getattr(arguments, name) is not None}
    if len(target) > 1 or bool(target) != (arguments.dataset is not None):
        raise ValueError(f"Give `dataset` with exactly one of {', '.join(TARGETS)}, or neither and `test` alone.")
    if not target and arguments.test is None:
        raise ValueError("There is nothing to do: give `dataset` and a target, or `test`.")
    if not (Path(arguments.router) / "config.json").exists():
        raise ValueError(f"{arguments.router} is no folder of a router; download a router of the hub first.")
    router = TokenRouter.from_pretrained(arguments.router).to(process_state().device)
    splits = {
        name: RouterDataset(path, invalid=True)
        for name, path in (("dataset", arguments.dataset), ("test", arguments.test))
        if path is not None
    }
    slm = arguments.slm or (router.config.slm or {}).get("name")
    if "token" in router.config.inputs:
        if slm is None:
            raise ValueError("The router has no record of its SLM, whose embedding it reads: pass `slm`.")
        router.check_slm(slm)
        router.attach_embedding_of(slm, np.unique(np.concatenate([split.predicted_ids() for split in splits.values()])))
    if target:
        result = calibrate_router(
            router,
            splits["dataset"],
            output_dir=arguments.router,
            batch_size=arguments.batch_size,
            samples=arguments.samples,
            **target,
        )
        Console().print(
            f"threshold {result.threshold:.6g}: LLM rate {result.rate:.3f}, recall {result.recall:.3f}, responses "
            f"without a missed token {result.accuracy:.3f}"
        )
    if arguments.test is None:
        return None
    report = report_on(
        router,
        splits["test"],
        arguments.output_dir or arguments.router,
        batch_size=arguments.batch_size,
        samples=arguments.samples,
    )
    print_report(report, f"{arguments.router} on {arguments.test}")
    return report


if __name__ == "__main__":
    main(*TrlParser((CalibrateRouterArguments,)).parse_args_and_config())
