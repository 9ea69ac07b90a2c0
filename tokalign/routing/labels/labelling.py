"""Labelling: the four stages from problems to the labels of a router, each a resumable job over the processes of this
launch, ids from end to end (R2R, arXiv 2505.21600, section 3.2).

    answers    the LLM answers every problem greedily (`on_policy`: its greedy choice along routed completions)
    prefill    one pass of the SLM over the answers: its choices, and the router's features beside them
    branches   the LLM goes on from every difference, behind the SLM's token
    labels     the verdict on every difference; splits train, calibration and test, by problem

What a stage does to a shard of rows is in `divergence` (answers, prefill), `branches` and `labeller`.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from tokalign.generation import EngineArguments, load_engine
from tokalign.generation.protocol import Engine, SamplingParams
from tokalign.generation.rollouts import sampler
from tokalign.generation.vocabulary import check_pair, end_ids, stored_generation_config
from tokalign.prompts import recorded_beside, rendering_of
from tokalign.rewards import answers_match, extract_answer
from tokalign.routing.labels.arguments import STAGES, LabelArguments, VerdictArguments
from tokalign.routing.labels.branches import BranchGrower, BranchLookup, Fork, continue_forks
from tokalign.routing.labels.divergence import DivergenceScorer, Row, add_llm_choices, add_slm_choices
from tokalign.routing.labels.judge import Judge
from tokalign.routing.labels.labeller import Labeller
from tokalign.routing.labels.report import build_label_report, plot_label_report, print_label_report
from tokalign.routing.labels.sentences import SentenceRule, sentence_rule
from tokalign.stage.errors import ContractError
from tokalign.stage.files import write_text_atomically
from tokalign.stage.hashes import content_hash, model_identity, tokenizer_hash
from tokalign.stage.jobs import Dropped, Kept, run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import read_manifest
from tokalign.stage.processes import process_state

SPLITS = ("train", "calibration", "test")
UNFINISHED = "the answer did not end within max_tokens"
EMPTY = "the answer is empty"
JUDGED_TOKENS = 256  # most tokens of a branch for a judge, who reads two sentences


class Labelling:
    """The stages of one labelling; a model is loaded by the first shard that needs it.

    Args:
        arguments: problems, SLM, stages and folder.
        verdict: how branches are grown and compared.
        llm: the large model and the engine that runs it.

    Raises:
        ValueError: the two models have different tokenizers.
    """

    def __init__(self, arguments: LabelArguments, verdict: VerdictArguments, llm: EngineArguments):
        self.arguments, self.verdict, self.llm = arguments, verdict, llm
        self.main = process_state().is_main_process
        self.folders = {name: Path(arguments.output_dir) / name for name in STAGES}
        self.outcome = verdict.verdict == "outcome"
        self.branch_limit = verdict.branch_max_tokens or (arguments.max_tokens if self.outcome else JUDGED_TOKENS)
        # Ids are never decoded and encoded again, so an id must mean the same to both models; only shared ones count
        trust = llm.trust_remote_code
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            llm.tokenizer or llm.model, trust_remote_code=trust
        )
        # One rule for labels, decoding and serving: the SLM's chat template renders the prompts that both models read
        slm_tokenizer = self.slm_tokenizer = AutoTokenizer.from_pretrained(arguments.slm, trust_remote_code=trust)
        slm_config, llm_config = (
            AutoConfig.from_pretrained(path, trust_remote_code=trust).get_text_config()
            for path in (arguments.slm, llm.model)
        )
        self.shared_vocab = check_pair(slm_tokenizer, self.tokenizer, slm_config.vocab_size, llm_config.vocab_size)
        # What a server does not tell of its model: how much it holds, and by which ids it ends an answer
        self.positions = getattr(llm_config, "max_position_embeddings", None)
        self.ends = end_ids(stored_generation_config(llm.model, trust_remote_code=trust), self.tokenizer)
        self.top_k = min(arguments.top_k, self.shared_vocab)
        # Every stage's manifest says by which models it was made; a stage of others is refused by their hashes
        self.models: dict[str, dict[str, Any]] = {
            "llm": {"path": llm.model, "weights_hash": model_identity(llm.model, remote=llm.engine == "openai")},
            "slm": {
                "path": arguments.slm,
                "weights_hash": model_identity(arguments.slm),
                "tokenizer_hash": tokenizer_hash(slm_tokenizer),
                "hidden_size": slm_config.hidden_size,
                "vocab_size": slm_config.vocab_size,
            },
        }
        if llm.adapter is not None:
            hashed = model_identity(llm.adapter, remote=llm.engine == "openai")
            self.models["llm"] |= {"adapter": llm.adapter, "adapter_hash": hashed}
        self.identity = {
            name: {k: v for k, v in model.items() if k.endswith("hash")} for name, model in self.models.items()
        }

    def run(self) -> None:
        """The stages of the arguments in their order, and the report behind the last of them."""
        stages = {
            "answers": self.routed_answers if self.arguments.on_policy is not None else self.answers,
            "prefill": self.prefill,
            "branches": self.branches,
            "labels": self.labels,
        }
        for name, stage in stages.items():
            if name in self.arguments.stages:
                try:
                    stage()
                finally:
                    self._free()  # the next stage may need another model's memory
        if "labels" in self.arguments.stages and self.main:
            self.report()

    def answers(self) -> None:
        """The LLM's greedy answer to every problem; what is empty or does not end is dropped and counted."""
        arguments = self.arguments
        problems = self._first(load_stage(arguments.dataset or "", split=arguments.split, stage="problems"))
        params = SamplingParams(temperature=0, max_tokens=arguments.max_tokens, stop=tuple(arguments.stop or ()))
        rendering = rendering_of(
            arguments,
            self.slm_tokenizer,
            recorded=recorded_beside(arguments.slm, self.llm.adapter, self.llm.model),
            of="the models' training",
            folder=self.folders["answers"],
        )
        limits: dict[str, Any] = {
            "prompt_format": rendering.format,
            "max_prompt_length": arguments.max_prompt_length,
        }

        def answer(rows: list[Row]) -> list[Row | Kept | Dropped]:
            sample = sampler(
                self.engine,
                params,
                extract=extract_answer,
                match=answers_match,
                rendering=rendering,
                renderer=self.slm_tokenizer,
                max_prompt_length=arguments.max_prompt_length,
            )
            return [finished_answer(item) for item in sample(rows)]

        parameters = {"max_tokens": arguments.max_tokens, "stop": arguments.stop, "split": arguments.split}
        parameters |= {"engine": self.llm.engine, "dtype": self.llm.dtype}
        prompts = rendering.record(self.slm_tokenizer)
        self._job("answers", answer, problems, {**limits, **parameters}, prompts=prompts)

    def routed_answers(self) -> None:
        """Answers that routed decoding has written, with the LLM's greedy choice at every position."""
        arguments = self.arguments
        routed = load_stage(arguments.on_policy or "", split=arguments.split, tokenizer=self.slm_tokenizer)
        for name in ("prompt", "answer", "prompt_ids", "completion_ids", "written_by"):
            if name not in routed.column_names:
                raise ContractError(f"{arguments.on_policy} has no column `{name}`; make it with `tokalign generate`.")
        scorer = cache(
            lambda: DivergenceScorer(
                self.llm.model,
                self.tokenizer,
                shared_vocab=self.shared_vocab,
                features=False,
                adapter=self.llm.adapter,
                token_budget=arguments.prefill_token_budget,
                dtype=self.llm.dtype,
                device_map=self.llm.device_map,
            )
        )
        parameters = {"split": arguments.split, "dtype": self.llm.dtype, "on_policy": True}
        self._job("answers", lambda batch: add_llm_choices(scorer(), batch), self._first(routed), parameters)

    def prefill(self) -> None:
        """The SLM's choice at every position of the answers, and what a router will read there."""
        arguments = self.arguments
        rows = load_stage(self.folders["answers"], tokenizer=self.slm_tokenizer)
        folder = self.folders["prefill"] / "features"
        scorer = cache(
            lambda: DivergenceScorer(
                arguments.slm,
                self.tokenizer,
                shared_vocab=self.shared_vocab,
                top_k=arguments.top_k,
                token_budget=arguments.prefill_token_budget,
                dtype=arguments.slm_dtype,
            )
        )
        self._job(
            "prefill",
            lambda batch: add_slm_choices(scorer(), batch, folder),
            rows,
            {"top_k": self.top_k, "shared_vocab": self.shared_vocab, "dtype": arguments.slm_dtype},
            **self._features("features"),
        )

    def branches(self) -> None:
        """From every difference the LLM's greedy continuation behind the SLM's token."""
        arguments, verdict = self.arguments, self.verdict
        rows = load_stage(self.folders["prefill"], tokenizer=self.slm_tokenizer)
        if self.outcome and "answer" not in rows.column_names:
            raise ContractError(
                f"{self.folders['prefill']} has no column `answer`, which --verdict outcome needs; build the problems "
                "with their answers, or use a judge."
            )
        grower = BranchGrower(
            grow=self._grow,
            outcome=self.outcome,
            rule=self.rule,
            max_tokens=self.branch_limit,
            most=verdict.max_branches_per_answer,
            seed=arguments.seed,
        )
        # Which branches the LLM wrote for this; the others are cut from its answers
        written = ["slm_branch_ids", *(["llm_branch_ids"] if "llm_ids" in rows.column_names else [])]
        parameters = {
            "verdict": verdict.verdict,
            "max_tokens": self.branch_limit,
            "stop": arguments.stop,
            "max_branches_per_answer": verdict.max_branches_per_answer,
            "seed": arguments.seed,
            "engine": self.llm.engine,
            "dtype": self.llm.dtype,
        }
        self._job("branches", grower, rows, parameters, written=written)

    def labels(self) -> None:
        """The verdict on every difference, in a stage for each split."""
        arguments = self.arguments
        rows = load_stage(self.folders["prefill"], tokenizer=self.slm_tokenizer)
        grown = read_manifest(self.folders["branches"])
        if grown["parameters"]["verdict"] != self.verdict.verdict:
            raise ContractError(
                f"{self.folders['branches']} was grown for the verdict {grown['parameters']['verdict']!r}, not "
                f"{self.verdict.verdict!r}; choose that one or another folder."
            )
        agree = grown.get("rows") == 0  # two models that agree everywhere
        branches = None if agree else load_stage(self.folders["branches"], tokenizer=self.slm_tokenizer)
        judge = Judge(self.verdict, self.llm)
        by_judge = None if self.outcome else judge.verdicts
        # By outcome the labeller compares the answers itself
        labeller = Labeller(BranchLookup(branches), self.tokenizer, by_judge, self.verdict.judge_context)
        told_by: dict[str, Any] = {"verdict": self.verdict.verdict}
        if self.main and not self.outcome:
            told_by |= judge.identity()
        told_by |= {"calibration_share": arguments.calibration_share, "test_share": arguments.test_share}
        # The job compares its input, which is the prefill stage; labels follow from the branches too
        told_by["branches"] = content_hash(branches) if self.main and branches is not None else None
        parts = split_indices(rows["id"], arguments.calibration_share, arguments.test_share)
        try:
            for split in SPLITS:
                if parts[split]:
                    more = {**self._features("../../prefill/features"), "judge": self.verdict.judge}
                    self._job("labels", labeller, rows.select(parts[split]), {**told_by, "split": split}, split, **more)
                elif self.main:
                    print(f"No problem falls into the split {split}; it is not written.")
        finally:
            judge.close()

    def report(self) -> None:
        """report.json, report.png and a table, from the finished stages."""
        splits = {s: self.folders["labels"] / s for s in SPLITS if (self.folders["labels"] / s).exists()}
        stages = {name: self.folders[name] for name in STAGES[:3]}
        report = build_label_report(stages, splits, swap_order=self.verdict.swap_order)
        root = Path(self.arguments.output_dir)
        write_text_atomically(root / "report.json", json.dumps(report, indent=2) + "\n")
        plot_label_report(report, root / "report.png")
        print_label_report(report)

    # ------------------------------------------------------------------------------------------ what the stages share

    @cached_property
    def engine(self) -> Engine:
        """The LLM."""
        return load_engine(self.llm)

    @cached_property
    def rule(self) -> SentenceRule | None:
        """A judge reads the current sentence and one more; an outcome needs the whole answer."""
        return None if self.outcome else sentence_rule(self.tokenizer, self.shared_vocab)

    def _grow(self, forks: list[Fork]) -> list[tuple[list[int], str]]:
        return continue_forks(
            self.engine,
            forks,
            self.ends,
            max_tokens=self.branch_limit,
            stop=tuple(self.arguments.stop or ()),
            rule=self.rule,
            positions=self.llm.max_model_len or self.positions,
        )

    def _job(
        self,
        stage: str,
        function: Callable[[list[Row]], Any],
        rows: Dataset,
        parameters: dict[str, Any],
        split: str = "",
        prompts: dict[str, Any] | None = None,
        **manifest: Any,
    ) -> None:
        """One stage, or one split of it, over its rows."""
        run_job(
            function,
            rows,
            self.folders[stage] / split,
            name=f"routing {stage} {split}".rstrip(),
            parameters={**self.identity, **parameters},
            shard_size=self.arguments.shard_size,
            # The ids of every stage mean the same to both; the SLM's tokenizer is the one that decoding goes by
            tokenizer=self.slm_tokenizer,
            prompts=prompts,
            extra_manifest={"models": self.models, "shared_vocab": self.shared_vocab, **manifest},
        )

    def _features(self, folder: str) -> dict[str, Any]:
        """What a stage's manifest says of the features: where they are, from that stage's folder, and their widths."""
        return {"features": folder, "hidden_size": self.models["slm"]["hidden_size"], "top_k": self.top_k}

    def _first(self, rows: Dataset) -> Dataset:
        most = self.arguments.num_problems
        return rows if most is None else rows.select(range(min(most, len(rows))))

    def _free(self) -> None:
        """Free the LLM, if a shard of this process has loaded it, and what a finished stage's model held."""
        if "engine" in self.__dict__:
            self.engine.close()
            del self.engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # vLLM counts what this process keeps as taken


def split_indices(ids: Sequence[Any], calibration_share: float, test_share: float) -> dict[str, list[int]]:
    """Rows of each split, by a hash of the problem's id: all completions of a problem are in one split."""
    parts: dict[str, list[int]] = {split: [] for split in SPLITS}
    for i, name in enumerate(ids):
        digest = hashlib.blake2b(f"routing split\0{name}".encode(), digest_size=8).digest()
        u = int.from_bytes(digest, "big") / 2**64
        held_out = "calibration" if u < calibration_share + test_share else "train"
        parts["test" if u < test_share else held_out].append(i)
    return parts


def finished_answer(item: list[Row] | Kept | Dropped) -> Row | Kept | Dropped:
    """The one greedy rollout of a problem, if labels can be made of it."""
    if not isinstance(item, list):  # never `Kept`, of one rollout
        return item
    (rollout,) = item
    if not rollout["completion"].strip():
        return Dropped(EMPTY)
    if rollout["finish_reason"] != "stop":
        return Dropped(UNFINISHED)
    return {key: value for key, value in rollout.items() if key != "logprobs"}
