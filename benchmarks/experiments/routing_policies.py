r"""Accuracy against cost for every routing policy, on one pair: the ledger world's, 0.16 M and 3.05 M parameters.

    python -m benchmarks.experiments.routing_policies
    python -m benchmarks.experiments.routing_policies --stages runs/benchmarks/routing_ledger    # shares its stages

Beside the policies of routing_ledger.py (its labels, routers and thresholds are used): hysteresis (R-Stitch), a value
head (CITER), an SLM that calls (RelayLLM), and lossless decoding. Each threshold is set on validation problems so that
a policy serves a given LLM rate; the test problems are read once.

- hysteresis has one threshold for both ways, as in the paper.
- The value head is linear in the SLM's hidden state and trained on the labels by outcome, like the routers.
- The SLM that calls is the SLM trained for some passes to write a spare token where the label is *divergent*, and what
  it would have written everywhere else. A call is for one LLM token. (RelayLLM's reinforcement learning is not here.)
- Lossless decoding is the LLM's own text at any threshold: with the neural router's thresholds, and with full drafts.

Two costs: `full_cost` counts arithmetic (parameters × positions of both models), `weight_reads` passes (parameters read
from memory at batch 1). Writes results.json and the plot; docs/results/routing.md shows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

from benchmarks.experiments.routing_ledger import (
    FIRST_SEED,
    GREEDY,
    LLM,
    NEURAL,
    SLM,
    RoutingLedgerArguments,
    RoutingSeed,
    prompts_of,
)
from benchmarks.render import CLAIM, Tables, claim, number, percent, save, write_json
from tokalign.evaluation.routing import run_summary
from tokalign.routing.decode.generator import RoutedGenerator
from tokalign.routing.decode.policies import CallPolicy, HysteresisPolicy, RoutingPolicy, ValuePolicy
from tokalign.routing.decode.policies.value import ValueHead
from tokalign.routing.decode.served_rate import served_threshold
from tokalign.routing.router.model import TokenRouter
from tokalign.stage.loading import load_stage
from tokalign.statistics import over_seeds, paired

HYSTERESIS, VALUE, CALL = "hysteresis", "value head", "call"
ROUTED = (NEURAL, "linear router", "entropy", "random", HYSTERESIS, VALUE, CALL)  # they trade accuracy for cost
LOSSLESS, FULL_DRAFTS = "lossless, router", "lossless, full drafts"
MEASURES = ("accuracy", "llm_rate", "activated_parameters", "full_cost", "weight_reads")
CALLED = "<|unk|>"  # a token of the pair that no ledger has
DIVERGENT = 2


@dataclass
class RoutingPoliciesArguments(RoutingLedgerArguments):
    """Sizes of the experiment."""

    output_dir: str = "runs/benchmarks/routing_policies"
    stages: str | None = field(default=None, metadata={"help": "Folder of routing_ledger.py, to share its stages."})
    drafts: list[int] = field(default_factory=lambda: [4, 16], metadata={"help": "Lengths of full drafts."})
    call_epochs: int = field(default=3, metadata={"help": "Passes over the labels that teach the SLM to call."})


class PoliciesSeed(RoutingSeed):
    """The policies that routing_ledger.py does not have, for one seed; whatever is there is kept."""

    args: RoutingPoliciesArguments

    @cached_property
    def value_head(self) -> Path:
        """A linear head on the hidden state: logistic regression on the labels, by the router's own trainer."""
        file = self.out / "value_head.safetensors"
        if not file.exists():
            data = {"dataset_name": self.out / "labels" / "labels", "slm": self.slm, "seed": self.seed}
            options = {"architecture": "linear", "inputs": "hidden", "learning_rate": 1e-2}
            trained = TokenRouter.from_pretrained(
                self.stages.recipe("routers/value", "router", "router", **data, **options)
            )
            head = ValueHead([trained.config.hidden_size])
            head.layers[0].load_state_dict(trained.head.state_dict())
            head.save(file)
        return file

    @cached_property
    def caller(self) -> Path:
        """The SLM that has learned to call."""
        folder = self.out / "caller"
        if not (folder / "config.json").exists():
            rows = load_stage(self.out / "labels" / "labels" / "train", stage="routing_labels")
            teach_calls(self.slm, rows, folder, self.seed, self.args.call_epochs)
        return folder

    def policy(self, name: str) -> tuple[str, RoutingPolicy, dict[str, Any]]:
        """SLM, policy and the options by which `tokalign generate` makes it, all but the threshold."""
        if name == HYSTERESIS:
            return self.slm, HysteresisPolicy(0.3), {"policy": "hysteresis"}
        if name == VALUE:
            head = ValueHead.load(self.value_head)
            return self.slm, ValuePolicy(head), {"policy": "value", "value_head": self.value_head}
        return str(self.caller), CallPolicy({CALLED: 1}, 0.5), {"policy": "call", "calls": f"{CALLED}=1"}

    def _serve(self, name: str) -> dict[str, float]:
        if name not in (HYSTERESIS, VALUE, CALL):
            return super()._serve(name)
        slm, policy, _ = self.policy(name)
        generator = RoutedGenerator.from_pretrained(slm, self.llm, policy=policy)
        prompts = prompts_of(self.world / "validation", generator)
        thresholds = {}
        for rate in sorted(self.args.rates):
            served = served_threshold(generator, prompts, GREEDY, rate)
            policy.threshold = thresholds[f"{rate:g}"] = served.threshold
        return thresholds

    def all_points(self) -> dict[str, dict[str, dict[str, float]]]:
        """Of each policy, `MEASURES` on the test problems by LLM rate (lossless: by threshold or length of drafts)."""
        self.points()  # those of routing_ledger.py; here they are read with one cost more
        folders = {SLM: {"": SLM}, LLM: {"": LLM}}
        folders |= {name: {f"{rate:g}": f"{name} {rate:g}" for rate in self.args.rates} for name in ROUTED[:4]}
        points = {
            name: {key: self._measures(self.out / "routed" / run.replace(" ", "_")) for key, run in runs.items()}
            for name, runs in folders.items()
        }
        for name in ROUTED[4:]:
            slm, _, options = self.policy(name)
            runs = {
                f"{rate:g}": self.stages.routed(
                    f"{name} {rate:g}", slm, self.llm, self.world / "test", self.seed, threshold=threshold, **options
                )
                for rate, threshold in self.thresholds(name).items()
            }
            points[name] = {key: self._measures(run) for key, run in runs.items()}
        lossless = {
            f"{rate:g}": self._routed(
                f"lossless {rate:g}", router=self.router(NEURAL), threshold=threshold, verify="true"
            )
            for rate, threshold in self.thresholds(NEURAL).items()
        }
        drafts = {
            f"{length}": self._routed(f"drafts {length}", policy="never", verify="true", most_draft=length)
            for length in self.args.drafts
        }
        for name, runs in ((LOSSLESS, lossless), (FULL_DRAFTS, drafts)):
            points[name] = {key: self._measures(run) for key, run in runs.items()}
        return points

    @staticmethod
    def _measures(run: Path) -> dict[str, float]:
        summary = run_summary(run)
        return {key: summary[key] for key in MEASURES}


def teach_calls(slm: str, rows: Any, folder: Path, seed: int, epochs: int) -> None:
    """Train the SLM to write `CALLED` at divergent tokens and what it writes anyway at all others.

    Args:
        rows: a split of routing labels.
        folder: of the trained model and its tokenizer.
    """
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(slm)
    model = AutoModelForCausalLM.from_pretrained(slm, dtype="float32").train()
    call, optimizer = tokenizer.convert_tokens_to_ids(CALLED), torch.optim.AdamW(model.parameters(), lr=1e-3)
    texts = [
        (
            row["prompt_ids"],
            row["completion_ids"],
            [call if c == DIVERGENT else s for s, c in zip(slm_ids, label, strict=True)],
        )
        for row in rows
        for slm_ids, label in [(row["slm_ids"], row["label"])]
    ]
    for _ in range(epochs):
        order = torch.randperm(len(texts)).tolist()
        for start in range(0, len(order), 32):
            batch = [texts[i] for i in order[start : start + 32]]
            width = max(len(prompt) + len(text) for prompt, text, _ in batch)
            ids = torch.full((len(batch), width), tokenizer.pad_token_id)
            targets = torch.full((len(batch), width), -100)
            for row, (prompt, text, wanted) in enumerate(batch):
                ids[row, : len(prompt) + len(text)] = torch.tensor([*prompt, *text])
                # The token before a position says what stands there. The text goes on as if there had been no call.
                targets[row, len(prompt) - 1 : len(prompt) + len(text) - 1] = torch.tensor(wanted)
            logits = model(ids, attention_mask=(ids != tokenizer.pad_token_id).long()).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def at_equal_rate(points: Mapping[str, Mapping[str, Mapping[str, float]]], rate: float) -> dict[str, float]:
    """Accuracy of each policy at exactly this LLM rate, see `routing_ledger.at_equal_rate`."""
    found = {}
    for name in ROUTED:
        served = sorted((p["llm_rate"], p["accuracy"]) for key in (SLM, name, LLM) for p in points[key].values())
        rates, accuracies = zip(*served, strict=True)
        found[name] = float(np.interp(rate, rates, accuracies))
    return found


def summarise(points: Sequence[Mapping[str, Any]], rates: Sequence[float]) -> dict[str, Any]:
    """Everything over seeds, from the points of each."""
    equal = {f"{rate:g}": [at_equal_rate(p, rate) for p in points] for rate in rates}
    return {
        "frontier": {
            name: {
                key: {measure: over_seeds([p[name][key][measure] for p in points]) for measure in MEASURES}
                for key in points[0][name]
            }
            for name in points[0]
        },
        "saving": {  # cost of the LLM alone / cost
            name: {
                key: {
                    cost: over_seeds([p[LLM][""][cost] / p[name][key][cost] for p in points]) for cost in MEASURES[3:]
                }
                for key in points[0][name]
            }
            for name in points[0]
        },
        "at_equal_rate": {name: {r: over_seeds([s[name] for s in by]) for r, by in equal.items()} for name in ROUTED},
        "differences": [
            {"worse": other, "rate": rate, "accuracy": paired([s[NEURAL] for s in by], [s[other] for s in by])}
            for other in ROUTED[4:]
            for rate, by in equal.items()
        ],
    }


def tables(results: dict[str, Any]) -> Tables:
    """Accuracy at equal rate, and what each policy costs beside the LLM alone."""
    equal, saving, frontier = results["at_equal_rate"], results["saving"], results["frontier"]
    rates = list(equal[NEURAL])
    shown = {rate: f"{100 * float(rate):g} %" for rate in rates}
    costs = []
    for name, by_key in frontier.items():
        for key, entry in by_key.items():
            what = "" if not key else f"drafts of {key}" if name == FULL_DRAFTS else f"{100 * float(key):g} %"
            ratios = (number(saving[name][key][cost]) for cost in MEASURES[3:])
            costs.append([name, what, percent(entry["llm_rate"]), percent(entry["accuracy"]), *ratios])
    claims = [
        claim(f"{NEURAL} > {d['worse']} at {shown[d['rate']]}", "–", d["accuracy"]) for d in results["differences"]
    ]
    return {
        "equal_rate": (("LLM tokens", *equal), [[shown[r], *(percent(equal[n][r]) for n in equal)] for r in rates]),
        "claims": (CLAIM, claims),
        "costs": (
            ("policy", "set for", "LLM tokens", "accuracy, %", "arithmetic: LLM / policy", "reads: LLM / policy"),
            costs,
        ),
    }


def figures(results: dict[str, Any]) -> dict[str, Figure]:
    """Accuracy against both costs, one line a policy."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    names = {"full_cost": "arithmetic", "weight_reads": "weights read at batch 1"}
    for axis, (cost, name) in zip(figure.subplots(1, 2, sharey=True), names.items(), strict=True):
        for k, (policy, by_key) in enumerate(results["frontier"].items()):
            points = sorted((e[cost]["mean"] / 1e6, 100 * e["accuracy"]["mean"]) for e in by_key.values())
            style = "none" if policy in (SLM, LLM) else ":" if policy.startswith("lossless") else "-"
            axis.plot(
                *zip(*points, strict=True), marker="o", linestyle=style, color=f"C{k}" if k < 10 else "k", label=policy
            )
        axis.set(xlabel=f"{name}, M parameters a token")
        axis.grid(alpha=0.3)
    figure.axes[0].set(ylabel="accuracy, per cent")
    figure.axes[1].legend(fontsize=7)
    return {"routing_policies.png": figure}


def main(args: RoutingPoliciesArguments) -> dict[str, Any]:
    points = []
    for number_ in range(args.seeds):
        run = PoliciesSeed(replace(args, output_dir=args.stages or args.output_dir), FIRST_SEED + number_)
        run.label_and_train()
        points.append(run.all_points())
        write_json(Path(args.output_dir) / f"points-{run.seed}.json", points[-1])
    return save(args.output_dir, {"arguments": asdict(args)} | summarise(points, args.rates), tables)


if __name__ == "__main__":
    main(*TrlParser((RoutingPoliciesArguments,)).parse_args_and_config())
