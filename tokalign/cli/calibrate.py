r"""Choose a trained router's threshold for a budget, on held-out responses, and store it in the router's config.json.

    tokalign calibrate --router runs/router --dataset runs/labels/labels/calibration --target_rate 0.12 \
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

from tokalign.routing.router.arguments import TargetArguments
from tokalign.routing.router.calibration import calibrate_router, report_on
from tokalign.routing.router.features import RouterDataset
from tokalign.routing.router.metrics import print_report
from tokalign.routing.router.model import TokenRouter
from tokalign.stage.processes import process_state


@dataclass
class CalibrateArguments:
    """The router, and the labels that it is measured on."""

    router: str = field(metadata={"help": "Folder of the router, which gets the threshold."})
    dataset: str | None = field(default=None, metadata={"help": "Held-out labels to choose on: …/labels/calibration."})
    test: str | None = field(default=None, metadata={"help": "Labels to report on: …/labels/test."})
    slm: str | None = field(default=None, metadata={"help": "The small model; default: the router's own record."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder of the report; default: the router's."})
    batch_size: int = field(default=4096, metadata={"help": "Tokens scored at a time."})
    samples: int = field(default=1000, metadata={"help": "Bootstrap resamples of responses."})


def main(arguments: CalibrateArguments, target: TargetArguments) -> dict[str, Any] | None:
    """Calibrate and report; the report, None without `test`."""
    if len(target.given) > 1 or bool(target.given) != (arguments.dataset is not None):
        raise ValueError(f"Give `dataset` with exactly one of {', '.join(vars(target))}, or neither and `test` alone.")
    if not target.given and arguments.test is None:
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
    measured: dict[str, Any] = {"batch_size": arguments.batch_size, "samples": arguments.samples}
    if target.given:
        result = calibrate_router(router, splits["dataset"], output_dir=arguments.router, **measured, **target.given)
        Console().print(
            f"threshold {result.threshold:.6g}: LLM rate {result.rate:.3f}, recall {result.recall:.3f}, responses "
            f"without a missed token {result.accuracy:.3f}"
        )
    if arguments.test is None:
        return None
    report = report_on(router, splits["test"], arguments.output_dir or arguments.router, **measured)
    print_report(report, f"{arguments.router} on {arguments.test}")
    return report
