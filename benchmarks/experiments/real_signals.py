r"""Which token signals of a real model find the first wrong step of solutions that people wrote or labelled.

    TOKALIGN_SHARED_DATA=folder python -m benchmarks.experiments.real_signals --output_dir runs/benchmarks/real_signals

`folder` holds mrben/math.jsonl, bigbench_mistake/*.jsonl and gsm8k/example_model_solutions.jsonl; `--extra` names more
files of step labels, in any format of `tokalign data step-labels`. Every registered signal (`READINGS`) of one model is
read on all of them; what it says of a step is the lowest and the mean of its tokens, and `tokalign.signals.steps` has
the figures: position-matched AUROC (the one to go by), pooled and within a solution, hit@1 beside chance, and by class
of token. Beside the signals stand controls that read nothing (the step's position, its length, random numbers) and a
linear probe on hidden states, which is told the labels of the other questions (cross-fit): what the model knows.

The adapters of the contrastive score and of DPO's implicit reward are trained on GSM8K's published solutions, one right
and one wrong a question, of questions that are in no test set. GSM8K itself is a test set by its other questions, in
two ways: whole solutions, published as right or wrong; and steps, whose labels are derived, not people's (`derived`).

A cell is one reading of one data set. It keeps the numbers of all tokens (`values/`), so figures can be made anew. A
killed run goes on where it was; two processes started alike share the cells. Writes results.json;
docs/results/detection.md shows it. A new signal joins by one row in READINGS.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import AutoTokenizer
from trl import TrlParser

from benchmarks.experiments.common import SMOLLM2, fast_products, held, kept
from benchmarks.experiments.dishonest import DATA
from benchmarks.ledger_stages import flags
from benchmarks.render import CLAIM, SHARE, Tables, claim, number, save
from tokalign.cli.stages import Stages
from tokalign.data.builders import step_labels
from tokalign.data.problems import read_lines
from tokalign.data.revision import load_templates, revision_prompts
from tokalign.generation import EngineArguments, load_engine
from tokalign.generation.protocol import SamplingParams, continue_from_prefixes
from tokalign.generation.scorer import CompletionScorer
from tokalign.signals import ClaimScorer, ContrastiveScorer, LikelihoodScorer, PromptingScorer
from tokalign.signals.registry import get
from tokalign.signals.steps import Steps, detection, difference, step_scores
from tokalign.stage.hashes import model_identity
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.pieces import token_offsets
from tokalign.stage.seeds import derived_seed
from tokalign.statistics import stratified_auroc

RECIPES = "recipes/smollm2-135m-instruct"
PUBLISHED = "gsm8k/example_model_solutions.jsonl"
FILES = {
    "mrben": "mrben/math.jsonl",
    "arithmetic": "bigbench_mistake/multistep_arithmetic.jsonl",
    "shuffled": "bigbench_mistake/tracking_shuffled_objects.jsonl",
    "deduction": "bigbench_mistake/logical_deduction.jsonl",
    "gsm8k": PUBLISHED,
}
TITLES = {
    "mrben": "MR-BEN mathematics",
    "arithmetic": "BIG-Bench Mistake, arithmetic",
    "shuffled": "BIG-Bench Mistake, shuffled objects",
    "deduction": "BIG-Bench Mistake, logical deduction",
    "gsm8k": "GSM8K, derived steps",
    "gsm8k_whole": "GSM8K, whole solutions",
}
WHOLE = "_whole"  # a view of a data set in which each solution is one step, right or wrong
REDUCED = ("min", "mean")
CLASSES = {"numbers": r"\d", "words": r"[^\W\d_]", "operators": r"[-+*/=<>×÷^%]"}  # the first that a token's text holds
PROBE = "linear probe"
CONTROLS = ("position", "length", "random")
PENALTIES = (1e1, 1e2, 1e3, 1e4)  # of the probe, on features of unit variance; chosen within the training questions
FOLDS = 5
LOGPROB = "logprob"
CONTINUED = 128  # most tokens of a continuation of the rollout estimate
PROPOSED = ("contrast", "implicit_reward", "token_reward")  # by papers, for finding wrong tokens


@dataclass
class RealSignalsArguments:
    """Sizes of the experiment."""

    model: str = field(default=SMOLLM2, metadata={"help": "Model under study: hub id or folder."})
    output_dir: str = "runs/benchmarks/real_signals"
    data: str | None = field(default=None, metadata={"help": f"Folder of the data sets; unset is ${DATA}."})
    sets: list[str] = field(default_factory=lambda: list(FILES), metadata={"help": "Which of them."})
    extra: list[str] = field(default_factory=list, metadata={"help": "Further files of step labels."})
    readings: list[str] = field(
        default_factory=lambda: list(READINGS), metadata={"help": "Which rows of READINGS; likelihood is always read."}
    )
    solutions: int = field(default=220, metadata={"help": "Solutions of each data set, whole questions at random."})
    train_pairs: int = field(default=400, metadata={"help": "Questions of GSM8K that the adapters are trained on."})
    seed: int = field(
        default=0, metadata={"help": "Of the choice of solutions, of training and of the random control."}
    )
    rollout_solutions: int = field(default=100, metadata={"help": "Solutions of GSM8K with a rollout estimate."})
    continuations: int = field(default=8, metadata={"help": "Continuations behind each of their steps."})
    resamples: int = field(default=1000, metadata={"help": "Of questions, for the intervals."})
    token_budget: int = field(default=4096, metadata={"help": "Tokens of one forward pass."})


# ---------------------------------------------------------------------------------------------------- GSM8K's solutions


def words(question: str) -> str:
    """What tells one question from another."""
    return " ".join(question.split()).casefold()


def results_of(line: str) -> list[float]:
    """The values that a line computes, by its calculator marks `<<16-3=13>>`."""
    values = []
    for text in re.findall(r"<<[^<>]*=([^<>=]*)>>", line):
        try:
            values.append(float(text.replace(",", "")))
        except ValueError:
            continue
    return values


def derived(lines: Sequence[str], right: Sequence[Sequence[str]]) -> int:
    """The first wrong line of a wrong solution, as far as right ones can tell.

    The first line with a value that no right solution of the question computes, else the last line, whose answer is
    wrong. A right value on a way that nobody else went counts as wrong, and a wrong value that a right solution has
    elsewhere as right; so these labels are less sure than people's.
    """
    known = {round(value, 6) for solution in right for line in solution for value in results_of(line)}
    for index, line in enumerate(lines):
        if any(round(value, 6) not in known for value in results_of(line)):
            return index
    return len(lines) - 1


def published(file: Path) -> Iterator[dict[str, Any]]:
    """Every published solution as a row of ProcessBench's format: its lines are steps, without calculator marks."""
    for row in read_lines(file, ("question", "ground_truth")):
        solutions = {name: made for name, made in row.items() if isinstance(made, dict) and "solution" in made}
        lines = {name: made["solution"].strip().split("\n") for name, made in solutions.items()}
        right = [row["ground_truth"].split("\n"), *(lines[n] for n, made in solutions.items() if made["is_correct"])]
        for name, made in solutions.items():
            yield {
                "generator": name,
                "problem": row["question"],
                "steps": [re.sub(r"<<[^<>]*>>", "", line) for line in lines[name]],
                "label": -1 if made["is_correct"] else derived(lines[name], right),
                "final_answer_correct": made["is_correct"],
            }


def in_test(question: str) -> bool:
    """Whether a question of GSM8K is of the test set; a third is, by its words."""
    return hashlib.blake2b(words(question).encode(), digest_size=8).digest()[0] % 3 == 0


def training_rows(rows: Sequence[Mapping[str, Any]], held_out: set[str], pairs: int, seed: int) -> list[dict[str, str]]:
    """`prompt`, `chosen`, `rejected` of questions that are in no test set and have solutions of both kinds.

    Args:
        rows: `published`.
        held_out: `words` of the questions of all test sets.
    """
    by_question: dict[str, dict[bool, list[str]]] = {}
    for row in rows:
        if not in_test(row["problem"]) and words(row["problem"]) not in held_out:
            both = by_question.setdefault(row["problem"], {True: [], False: []})
            both[row["final_answer_correct"]].append("\n".join(row["steps"]))
    asked = sorted(question for question, both in by_question.items() if both[True] and both[False])
    rng = np.random.default_rng(seed)
    return [
        {
            "prompt": asked[i],
            "chosen": both[True][rng.integers(len(both[True]))],
            "rejected": both[False][rng.integers(len(both[False]))],
        }
        for i in rng.permutation(len(asked))[:pairs]
        for both in [by_question[asked[i]]]
    ]


def write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


# ------------------------------------------------------------------------------------------------ what is read, and how


class DataSet(NamedTuple):
    """Solutions as `tokalign data step-labels` has them, and what their tokens are.

    Attributes:
        rows: with `prompt`, `completion`, `prompt_ids`, `completion_ids`, `step_tokens`, `first_wrong`, `question`.
        classes: of each solution, of each class of tokens (T,) booleans.
    """

    rows: list[dict[str, Any]]
    classes: list[dict[str, np.ndarray]]

    @property
    def ids(self) -> tuple[list[list[int]], list[list[int]]]:
        return [row["prompt_ids"] for row in self.rows], [row["completion_ids"] for row in self.rows]


class Read(NamedTuple):
    """What a reading gives: of each signal one list of numbers a solution, and its cost in model tokens a token."""

    values: dict[str, list[list[float]]]
    cost: float


class Experiment:
    """Data, adapters and readings in one folder; what is there is kept."""

    def __init__(self, args: RealSignalsArguments):
        self.args, self.folder = args, Path(args.output_dir)
        folder = args.data or os.environ.get(DATA)
        if not folder:
            raise SystemExit(f"Set {DATA}, or --data, to the folder that holds {', '.join(FILES.values())}.")
        self.data = Path(folder)
        self.files = {name: self.data / FILES[name] for name in args.sets}
        self.files |= {f"{Path(file).resolve().parent.name}_{Path(file).stem}": Path(file) for file in args.extra}
        self.loaded: dict[str, DataSet] = {}

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.args.model)

    def rollout_accuracy(self, data: DataSet) -> Read:
        """Share of right continuations behind every step of the first solutions; other solutions have no number.

        The signal as `tokalign score rollout` has it has one for every token, at ten times the cost. Here all tokens of
        a step have the share behind its last one.
        """
        args, output = self.args, self.folder / "rollouts"
        right = {words(row["question"]): last_number(row["ground_truth"]) for row in read_lines(self.data / PUBLISHED)}
        engines: list[Any] = []

        def estimate(batch: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            if not engines:
                engines.append(load_engine(EngineArguments(model=args.model, dtype="float32")))
            for row in batch:
                ids, lengths = row["completion_ids"], [step[-1] + 1 for step in row["step_tokens"] if step]
                seeds = [derived_seed(args.seed, row["id"], length) for length in lengths]
                params = [SamplingParams(n=args.continuations, max_tokens=CONTINUED, seed=seed) for seed in seeds]
                found = continue_from_prefixes(engines[0], row["prompt_ids"], ids, lengths, params)
                answer, shares = right[words(row["prompt"][0]["content"])], []
                for length, completions in zip(lengths, found, strict=True):
                    written = ([*ids[:length], *c.token_ids] for c in completions)
                    texts = [self.tokenizer.decode(each, skip_special_tokens=True) for each in written]
                    shares.append(sum(last_number(text) == answer for text in texts) / len(texts))
                sampled = sum(len(c.token_ids) for completions in found for c in completions)
                yield {"id": row["id"], "shares": shares, "tokens": sampled + len(row["prompt_ids"]) + len(ids)}

        read = data.rows[: args.rollout_solutions]
        columns = ("id", "prompt", "prompt_ids", "completion_ids", "step_tokens")
        rows = Dataset.from_list([{key: row[key] for key in columns} for row in read])
        parameters = {"model": model_identity(args.model), "seed": args.seed, "continuations": args.continuations}
        run_job(estimate, rows, output, name="rollouts behind steps", parameters=parameters, shard_size=4)
        for engine in engines:
            engine.close()
        done = load_stage(output).to_list()
        values = [[math.nan] * len(row["completion_ids"]) for row in data.rows]
        for row, own, estimated in zip(read, values, done, strict=False):  # later solutions have none
            for step, share in zip(filter(None, row["step_tokens"]), estimated["shares"], strict=True):
                for token in step:
                    own[token] = share
        scored = sum(len(row["completion_ids"]) for row in read)
        return Read({"rollout_accuracy": values}, sum(row["tokens"] for row in done) / scored)

    @cached_property
    def published(self) -> list[dict[str, Any]]:
        return list(published(self.data / PUBLISHED))

    def dataset(self, name: str) -> DataSet:
        """A data set in the model's ids, at most `solutions` of it."""
        if name not in self.loaded:
            out, source = self.folder / "data" / name, self.files[name]
            with held(self.folder / "locks" / f"data_{name}"):
                if name == "gsm8k":
                    source = self.folder / "data" / "gsm8k.jsonl"
                    if not source.exists():
                        write_lines(source, [row for row in self.published if in_test(row["problem"])])
                stages = Stages(self.folder / "data")
                options = flags(source=source, tokenizer=self.args.model, output_dir=out)
                stages.run(name, "data step-labels", *options)
            (stage,) = (file.parent for file in sorted(out.glob("*/manifest.json")))
            self.loaded[name] = chosen(load_stage(stage), self.tokenizer, self.args.solutions, self.args.seed)
        return self.loaded[name]

    def adapter(self, name: str) -> Path:
        """The adapter `positive`, `negative` or `dpo`, trained where it is not there yet."""
        folder = self.folder / "adapters" / f"{self.args.train_pairs}-{self.args.seed}"
        with held(folder / f"{name}.lock"):
            pairs = folder / "pairs.jsonl"
            held_out = {words(text) for file in self.files.values() for text in questions(file)}
            if pairs.exists() and any(words(row["prompt"][0]["content"]) in held_out for row in read_lines(pairs)):
                raise SystemExit(
                    f"{folder} was trained on questions of a test set that is new; use another --output_dir."
                )
            if not pairs.exists():
                rows = training_rows(self.published, held_out, self.args.train_pairs, self.args.seed)
                for side, key in (("positive", "chosen"), ("negative", "rejected")):
                    of_side = [{"prompt": user(row["prompt"]), "completion": says(row[key])} for row in rows]
                    write_lines(folder / f"{side}.jsonl", of_side)
                write_lines(
                    pairs,
                    [
                        {
                            "prompt": user(row["prompt"]),
                            "chosen": says(row["chosen"]),
                            "rejected": says(row["rejected"]),
                        }
                        for row in rows
                    ],
                )
            verb, file = ("dpo", pairs) if name == "dpo" else ("sft", folder / f"{name}.jsonl")
            config = f"{RECIPES}/{'dpo' if name == 'dpo' else f'{name}_sft'}_gsm8k.yaml"
            stages = Stages(folder / name)
            given = {"model_name_or_path": self.args.model, "dataset_name": file, "seed": self.args.seed}
            stages.train(name, verb, folder / name / "model", *flags(config=config, **given))
        return folder / name / "model"

    # ------------------------------------------------------------------------------------------------------ readings

    def options(self) -> dict[str, Any]:
        return {"token_budget": self.args.token_budget, "dtype": "float32"}

    def likelihood(self, data: DataSet) -> Read:
        scorer = LikelihoodScorer(self.args.model, self.tokenizer, signals=(LOGPROB, "entropy"), **self.options())
        return Read(scorer.score(*data.ids), cost_of(data, 1))

    def claim(self, data: DataSet) -> Read:
        scorer = ClaimScorer(self.args.model, self.tokenizer, **self.options())
        return Read(scorer.score(*data.ids), cost_of(data, 1))

    def implicit_reward(self, data: DataSet) -> Read:
        signals = {"signals": ("implicit_reward",)}
        scorer = LikelihoodScorer(self.args.model, self.tokenizer, self.adapter("dpo"), **signals, **self.options())
        return Read(scorer.score(*data.ids), cost_of(data, 2))

    def contrast(self, data: DataSet) -> Read:
        adapters = str(self.adapter("positive")), str(self.adapter("negative"))
        scorer = ContrastiveScorer(self.args.model, self.tokenizer, *adapters, **self.options())
        return Read({"contrast": scorer.score(*data.ids)}, cost_of(data, 2))

    def token_reward(self, data: DataSet) -> Read:
        templates = load_templates("math")
        sides = [{**row, "rejected": row["completion"], "rejected_ids": row["completion_ids"]} for row in data.rows]
        prompts = [revision_prompts(row, "rejected", templates, self.tokenizer) for row in sides]
        completions = data.ids[1]
        scorer = PromptingScorer(self.args.model, self.tokenizer, **self.options())
        better, worse = (list(side) for side in zip(*prompts, strict=True))
        cost = sum(map(len, better + worse)) / sum(map(len, completions)) + 2
        return Read({"token_reward": scorer.score(better, worse, completions)}, cost)

    def probe(self, data: DataSet) -> list[np.ndarray]:
        """Hidden states of each solution's tokens (T, D), two thirds up the layers."""
        scorer = CompletionScorer(self.args.model, self.tokenizer, {}, **self.options())
        prompts, completions = data.ids
        layer = round(scorer.base.config.num_hidden_layers * 2 / 3)
        found: dict[int, np.ndarray] = {}
        for batch in scorer._batches([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]):
            ids, _, _ = scorer._pad([prompts[i] for i in batch], [completions[i] for i in batch])
            with torch.inference_mode():
                states = scorer.base.base_model(input_ids=ids, use_cache=False, output_hidden_states=True)
            for row, i in enumerate(batch):
                first = len(prompts[i])
                found[i] = states.hidden_states[layer][row, first : first + len(completions[i])].numpy()
        return [found[i] for i in range(len(prompts))]


READINGS: dict[str, Callable[[Experiment, DataSet], Read]] = {
    "likelihood": Experiment.likelihood,
    "claim": Experiment.claim,
    "contrast": Experiment.contrast,
    "implicit_reward": Experiment.implicit_reward,
    "token_reward": Experiment.token_reward,
    "rollout_accuracy": Experiment.rollout_accuracy,
}
ONLY = {"rollout_accuracy": ("gsm8k",)}  # where the final answer is a number, and the model may find it


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def questions(file: Path) -> Iterator[str]:
    """The questions of a test file; of GSM8K's published solutions `in_test` says which are."""
    if file.as_posix().endswith(PUBLISHED):
        return
    for split in step_labels.splits_of(str(file)):
        for row in step_labels.solutions_of(str(file), split):
            yield row["question"]


def cost_of(data: DataSet, passes: int) -> float:
    """Model tokens for each token of a completion, where each pass reads prompt and completion."""
    prompts, completions = (sum(map(len, ids)) for ids in data.ids)
    return passes * (prompts + completions) / completions


def last_number(text: str) -> float | None:
    """The last number of a text, which is the answer of a solution in GSM8K's form."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None


def chosen(rows: Any, tokenizer: Any, solutions: int, seed: int) -> DataSet:
    """At most `solutions` rows, of whole questions in a random order."""
    by_question: dict[str, list[int]] = {}
    for index, question in enumerate(rows["question"]):
        by_question.setdefault(question, []).append(index)
    order = np.random.default_rng(seed).permutation(len(by_question))
    groups, taken = list(by_question.values()), []
    for i in order:
        if len(taken) + len(groups[i]) <= solutions:
            taken += groups[i]
    kept_rows = [dict(row) for row in rows.select(taken)]
    return DataSet(kept_rows, [token_classes(row, tokenizer) for row in kept_rows])


def token_classes(row: Mapping[str, Any], tokenizer: Any) -> dict[str, np.ndarray]:
    """Which tokens of a completion are of each class, by the first class whose characters their text holds."""
    text = row["completion"][0]["content"]
    offsets = token_offsets(tokenizer, row["completion_ids"], text)
    assert offsets is not None  # `step-labels` has dropped those that do not join
    kinds = [
        next((name for name, pattern in CLASSES.items() if re.search(pattern, text[start:end])), "")
        for start, end in offsets
    ]
    return {name: np.array([kind == name for kind in kinds], dtype=bool) for name in CLASSES}


# ------------------------------------------------------------------------------------------------------------- figures


def steps_of(data: DataSet, view: str) -> tuple[Steps, list[list[list[int]]]]:
    """The steps of a view and their tokens; of whole solutions each is one step, and its index the number of lines."""
    rows = data.rows
    first = [row["first_wrong"] for row in rows]
    if not view.endswith(WHOLE):
        steps = Steps.of([len(row["steps"]) for row in rows], first, [row["question"] for row in rows])
        return steps, [row["step_tokens"] for row in rows]
    places = {name: place for place, name in enumerate(dict.fromkeys(row["question"] for row in rows))}
    asked = np.array([places[row["question"]] for row in rows])
    wrong = np.array(first) >= 0
    # solutions of one question stand in one "solution", so `within` compares those
    steps = Steps(asked, asked, np.array([len(row["steps"]) for row in rows]), wrong, ~wrong)
    return steps, [[sorted({token for step in row["step_tokens"] for token in step})] for row in rows]


def views(name: str) -> tuple[str, ...]:
    return (name, f"{name}{WHOLE}") if name == "gsm8k" else (name,)


def figures_of(
    suspicion: Sequence[np.ndarray], data: DataSet, view: str, resamples: int, seed: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Figures of one signal on one view, and the scores of the steps that they are of, by "min" and "mean".

    Args:
        suspicion: of each solution (T,), low = suspicious.
    """
    steps, tokens = steps_of(data, view)
    options = {"samples": resamples, "seed": seed}
    scores = {reduce: step_scores(suspicion, tokens, reduce) for reduce in REDUCED}
    found: dict[str, Any] = {reduce: step_figures(scores[reduce], steps, tokens, view, **options) for reduce in REDUCED}
    found["classes"] = {}
    for name in CLASSES:
        keep = [of[name] for of in data.classes]
        own = {reduce: step_scores(suspicion, tokens, reduce, keep) for reduce in REDUCED}
        scores |= {f"{name}_{reduce}": own[reduce] for reduce in REDUCED}
        found["classes"][name] = {reduce: matched(own[reduce], steps, **options) for reduce in REDUCED}
    return found, scores


def matched(scores: np.ndarray, steps: Steps, *, samples: int, seed: int) -> dict[str, Any] | None:
    """The position-matched AUROC alone."""
    at = np.isfinite(scores) & (steps.wrong | steps.right)
    columns = (array[at] for array in (scores, steps.wrong, steps.index, steps.question))
    return stratified_auroc(*columns, samples=samples, seed=seed)


def step_figures(
    scores: np.ndarray, steps: Steps, tokens: Sequence[Sequence[Sequence[int]]], view: str, **options: int
) -> dict[str, Any]:
    """`detection`, without hit@1 where the view has no steps to choose from."""
    found = detection(scores, steps, lengths=lengths_of(tokens), **options)
    return {**found, "hit1": None, "hit1_all": None} if view.endswith(WHOLE) else found


def lengths_of(tokens: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
    return np.array([len(step) for solution in tokens for step in solution])


def control_scores(data: DataSet, view: str, seed: int) -> dict[str, np.ndarray]:
    """Scores of steps by what needs no model: later, longer, at random; low = suspicious."""
    steps, tokens = steps_of(data, view)
    lengths = lengths_of(tokens)
    rng = np.random.default_rng(seed)
    known = np.where(lengths > 0, 1.0, np.nan)  # a step without tokens takes part in no figure
    return {
        "position": -steps.index * known,
        "length": -lengths * known,
        "random": rng.random(len(lengths)) * known,
    }


def cross_fit(features: np.ndarray, wrong: np.ndarray, compared: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Scores of steps by a ridge classifier that has not seen their question, low = wrong.

    Targets are −1 for wrong and 1 for right steps, centred, so this is Fisher's discriminant with a shrunk covariance.
    The penalty of each fold is the one that ranks best in a further cross-fit among the other folds' questions.

    Args:
        features: (N, D). wrong: (N,) booleans. compared: (N,) the steps to learn from. groups: (N,) questions.
    """
    fold = np.array([int.from_bytes(hashlib.blake2b(str(g).encode(), digest_size=4).digest(), "big") for g in groups])
    fold %= FOLDS
    scores = np.full(len(features), np.nan)
    for held_out in range(FOLDS):
        train = compared & (fold != held_out)
        inner = np.full((len(PENALTIES), len(features)), np.nan)
        for part in range(FOLDS):
            fit, asked = train & (fold != part), train & (fold == part)
            if part != held_out and asked.any():
                inner[:, asked] = np.stack([ridge(features, wrong, fit, asked, p) for p in PENALTIES])
        # rank by the distance of the two kinds' means in units of the spread: steps of all folds are one scale
        separate = [
            (row[train & ~wrong].mean() - row[train & wrong].mean()) / row[train].std()
            if (train & wrong).any() and (train & ~wrong).any()
            else 0.0
            for row in inner
        ]
        asked = fold == held_out
        if asked.any():
            scores[asked] = ridge(features, wrong, train, asked, PENALTIES[int(np.argmax(separate))])
    return scores


def ridge(features: np.ndarray, wrong: np.ndarray, train: np.ndarray, asked: np.ndarray, penalty: float) -> np.ndarray:
    """Scores (those `asked`,) of a ridge regression of right on features of the steps in `train`.

    NaN where these are all right or all wrong (short runs): such steps teach nothing.
    """
    if wrong[train].all() or not wrong[train].any():
        return np.full(asked.sum(), np.nan)
    centre, scale = features[train].mean(0), features[train].std(0) + 1e-6
    x = (features[train] - centre) / scale
    y = np.where(wrong[train], -1.0, 1.0)
    gram = x.T @ x + penalty * np.eye(x.shape[1])
    return ((features[asked] - centre) / scale) @ np.linalg.solve(gram, x.T @ (y - y.mean()))


def probe_scores(states: Sequence[np.ndarray], data: DataSet, view: str) -> np.ndarray:
    """Cross-fit scores of steps from the mean and the last of their tokens' hidden states."""
    steps, tokens = steps_of(data, view)
    width = states[0].shape[1]
    features = np.full((len(steps.index), 2 * width), np.nan)
    at = 0
    for own, solution in zip(states, tokens, strict=True):
        for step in solution:
            if step:
                features[at] = np.concatenate([own[step].mean(0), own[step[-1]]])
            at += 1
    known = np.isfinite(features[:, 0])
    compared = known & (steps.wrong | steps.right)
    scores = cross_fit(np.nan_to_num(features), steps.wrong, compared, steps.question)
    return np.where(known, scores, np.nan)


# --------------------------------------------------------------------------------------------------------------- cells


def reading_cell(experiment: Experiment, reading: str, name: str) -> dict[str, Any]:
    """One reading of one data set."""
    args, data, started = experiment.args, experiment.dataset(name), time.perf_counter()
    read = READINGS[reading](experiment, data)
    seconds = round(time.perf_counter() - started, 1)
    cell: dict[str, Any] = {"signals": {}, "seconds": seconds, "tokens_a_token": read.cost}
    for signal, values in read.values.items():
        suspicion = [get(signal).suspicion(np.asarray(own)) for own in values]
        keep(experiment, name, f"tokens_{signal}", {"values": np.concatenate(suspicion)})
        cell["signals"][signal] = {}
        for view in views(name):
            found, scores = figures_of(suspicion, data, view, args.resamples, args.seed)
            keep(experiment, view, signal, scores)
            cell["signals"][signal][view] = found
    return cell


def controls_cell(experiment: Experiment, name: str) -> dict[str, Any]:
    """Controls and the probe, which have scores of steps and none of tokens."""
    args, data, started = experiment.args, experiment.dataset(name), time.perf_counter()
    states = experiment.probe(data)
    cell: dict[str, Any] = {"signals": {}, "counts": {}}
    for view in views(name):
        scores = control_scores(data, view, args.seed) | {PROBE: probe_scores(states, data, view)}
        steps, tokens = steps_of(data, view)
        for signal, own in scores.items():
            found = step_figures(own, steps, tokens, view, samples=args.resamples, seed=args.seed)
            keep(experiment, view, signal, {"mean": own})
            cell["signals"].setdefault(signal, {})[view] = {"mean": found, "classes": {}}
        cell["counts"][view] = {
            "solutions": len(data.rows),
            "questions": len({row["question"] for row in data.rows}),
            "steps": len(steps.index),
            "wrong": int(steps.wrong.sum()),
            "right": int(steps.right.sum()),
            "tokens": sum(len(row["completion_ids"]) for row in data.rows),
        }
    return cell | {"seconds": round(time.perf_counter() - started, 1)}


def keep(experiment: Experiment, view: str, signal: str, arrays: Mapping[str, np.ndarray]) -> None:
    file = experiment.folder / "values" / view / f"{signal.replace(' ', '_')}.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.npz")
    np.savez(part, **arrays)
    part.replace(file)


def kept_scores(experiment: Experiment, view: str, signal: str) -> dict[str, np.ndarray]:
    with np.load(experiment.folder / "values" / view / f"{signal.replace(' ', '_')}.npz") as file:
        return dict(file)


def main(args: RealSignalsArguments) -> dict[str, Any]:
    experiment = Experiment(args)
    readings = dict.fromkeys(["likelihood", *args.readings])
    cells: dict[str, Callable[[], Any]] = {}
    # the readings that need no adapter first, data set by data set, so that a page has rows early
    for name in experiment.files:
        cells[f"{name}.controls"] = partial(controls_cell, experiment, name)
    for reading in readings:
        for name in experiment.files:
            if name not in ONLY.get(reading, (name,)):
                continue
            cells[f"{name}.{reading}"] = partial(reading_cell, experiment, reading, name)
    settings = {
        key: getattr(args, key)
        for key in ("model", "solutions", "train_pairs", "rollout_solutions", "continuations", "seed", "resamples")
    }

    def after(found: dict[str, Any]) -> None:
        save(experiment.folder, summary(experiment, found, differences=False), lambda _: {})

    found = kept(cells, experiment.folder / "cells", settings=settings, after=after)
    return save(experiment.folder, summary(experiment, found, differences=True), tables)


def summary(experiment: Experiment, found: Mapping[str, Any], *, differences: bool) -> dict[str, Any]:
    """results.json: view -> signal -> figures and cost, of the cells that there are."""
    args = experiment.args
    by_view: dict[str, dict[str, Any]] = {}
    counts: dict[str, Any] = {}
    for cell in found.values():
        counts |= cell.get("counts", {})
        for signal, of_views in cell["signals"].items():
            for view, figures in of_views.items():
                cost = {"tokens_a_token": cell.get("tokens_a_token")}
                by_view.setdefault(view, {})[signal] = {**figures, **cost}
    if differences:
        for view, signals in by_view.items():
            steps, _ = steps_of(experiment.dataset(view.removesuffix(WHOLE)), view)
            base = kept_scores(experiment, view, LOGPROB)
            for signal, entry in signals.items():
                own = kept_scores(experiment, view, signal)
                options = {"samples": args.resamples, "seed": args.seed}
                entry["above_logprob"] = {
                    reduce: difference(own[reduce], base[reduce], steps, **options)
                    for reduce in REDUCED
                    if reduce in own
                }
    return {
        "arguments": asdict(args) | {"data": None},
        "counts": counts,
        "views": by_view,
        "seconds": {name: cell.get("seconds") for name, cell in found.items()},
    }


# --------------------------------------------------------------------------------------------------------------- tables


def entry_of(figure: Mapping[str, Any] | None, key: str = "auroc") -> dict[str, Any] | None:
    """A figure as `render.number` reads one."""
    return None if figure is None else {"mean": figure[key], "ci95": figure["ci95"]}


def cell_of(figure: Mapping[str, Any] | None, key: str = "auroc") -> str:
    entry = entry_of(figure, key)
    return "–" if entry is None else number(entry, 3, within=SHARE)


def title_of(view: str) -> str:
    return TITLES.get(view, view)


def name_of(signal: str) -> str:
    return signal if signal in (*CONTROLS, PROBE) else get(signal).title


def order(signals: Mapping[str, Any]) -> list[str]:
    last = [name for name in (PROBE, *CONTROLS) if name in signals]
    return [name for name in signals if name not in last] + last


def hits(found: Mapping[str, Any] | None) -> str:
    return "–" if found is None else f"{found['share']:.2f} ({found['chance']:.2f})"


def tables(results: dict[str, Any]) -> Tables:
    """Position-matched AUROC of all data sets; of each data set all figures; by class of token; claims; sizes."""
    by_view: Mapping[str, Mapping[str, Any]] = results["views"]
    listed = list(by_view)
    names = order({signal: None for signals in by_view.values() for signal in signals})
    matched = []
    for signal in names:
        for reduce in REDUCED:
            entries = [by_view[view].get(signal, {}).get(reduce) for view in listed]
            if any(entries):
                cost = next((of[signal]["tokens_a_token"] for of in by_view.values() if signal in of), None)
                matched.append(
                    [labelled(signal, reduce)]
                    + [cell_of(entry["matched"]) if entry else "–" for entry in entries]
                    + ["–" if cost is None else f"{cost:.1f}"]
                )
    made: Tables = {
        "matched": (("signal", *(title_of(view) for view in listed), "tokens a token"), matched),
        "sizes": (
            ("data set", "solutions", "questions", "steps", "first wrong", "right"),
            [
                [title_of(view), *(f"{of[key]:,}" for key in ("solutions", "questions", "steps", "wrong", "right"))]
                for view, of in results["counts"].items()
            ],
        ),
        "claims": (CLAIM, claims(by_view)),
        "rollout": f"{results['arguments']['rollout_solutions']} solutions",
        "against_logprob": (("signal", *(title_of(view) for view in listed)), against_logprob(by_view, names)),
    }
    headings = (
        *("signal", "position-matched", "length-matched too", "pooled", "within a solution"),
        *("hit@1 (chance)", "of all steps (chance)"),
    )
    for view in [*FILES, *(f"{name}{WHOLE}" for name in FILES), *listed]:
        rows, classes = [], []
        for signal in order(by_view.get(view, {})):
            entry = by_view[view][signal]
            for reduce in REDUCED:
                if (of := entry.get(reduce)) is None:
                    continue
                rows.append(
                    [labelled(signal, reduce)]
                    + [cell_of(of[key]) for key in ("matched", "length_matched", "pooled", "within")]
                    + [hits(of["hit1"]), hits(of["hit1_all"])]
                )
            if entry["classes"]:
                classes += [
                    [labelled(signal, reduce), *(cell_of(entry["classes"][kind][reduce]) for kind in CLASSES)]
                    for reduce in REDUCED
                ]
        made[view] = (headings, rows)
        made[f"{view}_classes"] = (("signal", *CLASSES), classes)
    return made


def claims(by_view: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Whether the signals that papers propose find the first wrong step better than chance, by a step's lowest."""
    rows = []
    for view, signals in by_view.items():
        for signal in (name for name in order(signals) if name in PROPOSED):
            entry = entry_of(signals[signal]["min"]["matched"])
            if entry is not None:
                what = f"{title_of(view)}: {name_of(signal)} is above chance"
                rows.append(claim(what, "–", entry, "AUROC", digits=3, sign="", level=0.5))
    return rows


def against_logprob(by_view: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> list[list[str]]:
    """Position-matched AUROC of every signal minus that of the log-prob on the same steps, lowest and mean alike."""
    rows = []
    for signal in names:
        for reduce in REDUCED:
            entries = [by_view[view].get(signal, {}).get("above_logprob", {}).get(reduce) for view in by_view]
            if signal != LOGPROB and any(entries):
                shown = [
                    number({"mean": entry["difference"], "ci95": entry["ci95"]}, 3, "+") if entry else "–"
                    for entry in entries
                ]
                rows.append([labelled(signal, reduce), *shown])
    return rows


def labelled(signal: str, reduce: str) -> str:
    """A signal as a row of a table; those that score steps have no tokens to reduce."""
    return name_of(signal) + ("" if signal in (*CONTROLS, PROBE) else f", {'lowest' if reduce == 'min' else 'mean'}")


def figures(results: dict[str, Any]) -> dict[str, Figure]:
    """Position-matched AUROC of every signal on every data set."""
    by_view = results["views"]
    figure = Figure(figsize=(3.2 * max(1, len(by_view)), 4.2), layout="constrained")
    panels = figure.subplots(1, max(1, len(by_view)), sharey=True, squeeze=False)[0]
    for axis, (view, signals) in zip(panels, by_view.items(), strict=False):
        for row, signal in enumerate(order(signals)):
            for reduce, colour in (("min", "C0"), ("mean", "C1")):
                entry = entry_of((signals[signal].get(reduce) or {}).get("matched"))
                if entry is not None:
                    low, high = entry["ci95"]
                    shift = -0.12 if reduce == "min" else 0.12
                    axis.plot([low, high], [row + shift] * 2, color=colour)
                    axis.plot(entry["mean"], row + shift, "o", color=colour, markersize=4)
        axis.set_yticks(range(len(signals)), [name_of(signal) for signal in order(signals)])
        axis.invert_yaxis()
        axis.axvline(0.5, color="grey", linestyle=":")
        axis.set_title(title_of(view), fontsize=9)
    figure.supxlabel("position-matched AUROC: lowest token of a step (blue), mean (orange)", fontsize=9)
    return {"detection.png": figure}


if __name__ == "__main__":
    with fast_products():
        main(*TrlParser((RealSignalsArguments,)).parse_args_and_config())
