"""Routing labels of a small and a large model (R2R, arXiv 2505.21600): which tokens only the large one should write.

Four stages, each a resumable job over the processes of this launch, ids from end to end:

    answers    the LLM answers every problem greedily (`--on_policy`: its greedy choice along routed completions)
    prefill    one pass of the SLM over the answers: its choices, and the router's features beside them
    branches   the LLM goes on from every difference, behind the SLM's token
    labels     the verdict on every difference; splits train, calibration and test, by problem

`--stages` runs some of them; each loads only the model that it needs. A last line and report.json say what came out.

accelerate launch scripts/label_routing.py \
    --model deepseek-ai/DeepSeek-R1-Distill-Qwen-32B --engine vllm --slm deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B \
    --dataset runs/problems --output_dir runs/labels --max_tokens 8192 --verdict outcome

accelerate launch scripts/label_routing.py --stages answers prefill branches labels \
    --model Qwen/Qwen3-8B --engine vllm --slm Qwen/Qwen3-0.6B --dataset runs/problems --output_dir runs/labels \
    --verdict judge --judge Qwen/Qwen2.5-72B-Instruct --judge_engine server --judge_base_urls http://localhost:8000/v1 \
    --swap_order true
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from trl import TrlParser

from tokalign.generation import EngineArguments, load_engine
from tokalign.generation.protocol import Engine, SamplingParams
from tokalign.generation.rollouts import sampler
from tokalign.rewards import answers_match, extract_answer
from tokalign.routing.decode.backend import check_pair
from tokalign.routing.labels.divergence import (
    DivergenceScorer,
    Fork,
    SentenceRule,
    continue_forks,
    end_ids,
    sentence_rule,
)
from tokalign.routing.labels.report import build_label_report, plot_label_report, print_label_report
from tokalign.routing.labels.rows import (
    SPLITS,
    BranchGrower,
    BranchLookup,
    Labeller,
    add_llm_choices,
    add_slm_choices,
    finished_answer,
    split_indices,
)
from tokalign.routing.labels.verdicts import (
    Ask,
    Comparison,
    Verdict,
    engine_judge,
    judge_template_hash,
    judge_verdicts,
    load_judge_template,
    server_judge,
)
from tokalign.stage.errors import ContractError
from tokalign.stage.files import write_text_atomically
from tokalign.stage.hashes import content_hash, tokenizer_hash, weights_hash
from tokalign.stage.jobs import Dropped, run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import read_manifest
from tokalign.stage.processes import end_processes, process_state

STAGES = ("answers", "prefill", "branches", "labels")


@dataclass
class LabelRoutingArguments:
    """Arguments of labelling; the LLM and its engine are those of `EngineArguments`."""

    slm: str = field(metadata={"help": "Small model: hub id or path."})
    output_dir: str = field(metadata={"help": "Folder of the stages and the report."})
    dataset: str | None = field(default=None, metadata={"help": "Problems stage: folder or hub id."})
    on_policy: str | None = field(
        default=None,
        metadata={"help": "Stage of scripts/generate_routed.py: its completions are labelled instead of LLM answers."},
    )
    stages: list[str] = field(
        default_factory=lambda: list(STAGES), metadata={"help": "Which to run: answers, prefill, branches, labels."}
    )
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    num_problems: int | None = field(default=None, metadata={"help": "Take the first problems only."})
    max_tokens: int = field(
        default=4096, metadata={"help": "Most tokens of an answer; one that does not end is dropped."}
    )
    stop: list[str] | None = field(default=None, metadata={"help": "Strings that end an answer."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longer prompts are dropped and counted; unset is what the model can hold."}
    )
    prompt_format: Literal["chat", "raw"] = field(
        default="chat",
        metadata={"help": "`chat` renders a prompt by the chat template, `raw` encodes a string as it is."},
    )
    top_k: int = field(default=100, metadata={"help": "Largest logits of the SLM kept a position (paper: 100)."})
    slm_dtype: str = field(default="auto", metadata={"help": "Type of the SLM's weights."})
    prefill_token_budget: int = field(default=16384, metadata={"help": "Tokens of one forward pass, padding included."})
    verdict: Literal["outcome", "judge"] = field(
        default="outcome",
        metadata={"help": "`outcome`: does the branch reach the right answer? `judge`: does a model see a difference?"},
    )
    branch_max_tokens: int | None = field(
        default=None, metadata={"help": "Most tokens of a branch; unset is max_tokens for outcome, 256 for a judge."}
    )
    max_branches_per_answer: int | None = field(
        default=None, metadata={"help": "Differences continued an answer, at random; the others are invalid."}
    )
    judge: str | None = field(default=None, metadata={"help": "Judge: hub id or path; with a server its served name."})
    judge_engine: Literal["server", "vllm", "transformers", "openai"] = field(
        default="server",
        metadata={"help": "`server` is any chat server of the OpenAI API; the others as --engine, with its options."},
    )
    judge_base_urls: list[str] | None = field(default=None, metadata={"help": "Addresses of the judge's servers."})
    judge_template: str = field(default="general", metadata={"help": "`general`, or the path of a JSON file."})
    judge_max_tokens: int = field(default=512, metadata={"help": "Most tokens of a judge's reply."})
    judge_context: int = field(default=1024, metadata={"help": "Tokens of the answer before a difference it reads."})
    swap_order: bool = field(
        default=False, metadata={"help": "Ask the judge in both orders; a disagreement is invalid and counted."}
    )
    calibration_share: float = field(default=0.1, metadata={"help": "Share of problems that set the threshold."})
    test_share: float = field(default=0.1, metadata={"help": "Share of problems that only the report sees."})
    seed: int = field(default=0, metadata={"help": "Seed of max_branches_per_answer; answers are greedy."})
    shard_size: int = field(
        default=32, metadata={"help": "Answers a shard: what a kill can lose. Their features are in memory at a time."}
    )

    def __post_init__(self) -> None:
        if unknown := [stage for stage in self.stages if stage not in STAGES]:
            raise ValueError(f"There is no stage {unknown[0]!r}: --stages takes {', '.join(STAGES)}.")
        if (self.dataset is None) == (self.on_policy is None):
            raise ValueError("Give either --dataset (problems) or --on_policy (routed completions).")
        shares = (self.calibration_share, self.test_share)
        if min(shares) < 0 or sum(shares) >= 1:
            raise ValueError(
                f"--calibration_share {shares[0]} and --test_share {shares[1]} leave nothing to train on: use shares "
                "whose sum is below 1."
            )
        if self.verdict == "judge" and self.judge is None:
            raise ValueError("--verdict judge needs --judge, the model that compares branches.")
        if self.verdict == "judge" and self.judge_engine in ("server", "openai") and not self.judge_base_urls:
            raise ValueError("A judge on a server needs --judge_base_urls, e.g. http://localhost:8000/v1.")

    @property
    def branch_limit(self) -> int:
        return self.branch_max_tokens or (self.max_tokens if self.verdict == "outcome" else 256)


class Labelling:
    """The stages of one labelling; models are loaded by the first shard that needs them."""

    def __init__(self, arguments: LabelRoutingArguments, engine_arguments: EngineArguments):
        self.arguments, self.engine_arguments = arguments, engine_arguments
        root = Path(arguments.output_dir)
        self.folders = {name: root / name for name in STAGES}
        trust = engine_arguments.trust_remote_code
        llm = engine_arguments.model
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            engine_arguments.tokenizer or llm, trust_remote_code=trust
        )
        slm_tokenizer = AutoTokenizer.from_pretrained(arguments.slm, trust_remote_code=trust)
        slm_config, llm_config = (
            AutoConfig.from_pretrained(path, trust_remote_code=trust).get_text_config() for path in (arguments.slm, llm)
        )
        self.shared_vocab = check_pair(slm_tokenizer, self.tokenizer, slm_config.vocab_size, llm_config.vocab_size)
        self.positions = getattr(llm_config, "max_position_embeddings", None)
        self.ends = end_ids(llm, self.tokenizer)
        main = process_state().is_main_process
        # Only the main process compares and writes hashes, and hashing 60 GB takes a while
        on_server = engine_arguments.engine == "openai" and not Path(llm).is_dir()
        self.models: dict[str, dict[str, Any]] = {
            "llm": {"path": llm, "weights_hash": llm if on_server else weights_hash(llm) if main else None},
            "slm": {
                "path": arguments.slm,
                "weights_hash": weights_hash(arguments.slm) if main else None,
                "tokenizer_hash": tokenizer_hash(slm_tokenizer),
                "hidden_size": slm_config.hidden_size,
                "vocab_size": slm_config.vocab_size,
            },
        }
        if engine_arguments.adapter is not None:
            path = engine_arguments.adapter
            remote = engine_arguments.engine == "openai" and not Path(path).is_dir()
            self.models["llm"] |= {"adapter": path, "adapter_hash": path if remote else weights_hash(path)}
        self.identity = {
            name: {k: v for k, v in model.items() if k.endswith("hash")} for name, model in self.models.items()
        }

    def run(
        self,
        name: str,
        function: Callable[[list[dict[str, Any]]], Any],
        rows: Dataset,
        folder: Path,
        parameters: dict[str, Any],
        **manifest: Any,
    ) -> None:
        run_job(
            function,
            rows,
            folder,
            name=name,
            parameters={**self.identity, **parameters},
            shard_size=self.arguments.shard_size,
            # The ids of every stage are the LLM's tokenizer's
            tokenizer=self.tokenizer,
            extra_manifest={"models": self.models, "shared_vocab": self.shared_vocab, **manifest},
        )

    @cached_property
    def engine(self) -> Engine:
        return load_engine(self.engine_arguments)

    def close(self) -> None:
        """Free the LLM, if a shard of this process has loaded it, and what a finished stage's model held."""
        if "engine" in self.__dict__:
            self.engine.close()
            del self.engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # vLLM counts what this process keeps as taken

    # ---------------------------------------------------------------------------------------------------- answers

    def answers(self) -> None:
        arguments = self.arguments
        if arguments.on_policy is not None:
            return self.routed_answers()
        assert arguments.dataset is not None
        problems = load_stage(arguments.dataset, split=arguments.split, stage="problems")
        if arguments.num_problems is not None:
            problems = problems.select(range(min(arguments.num_problems, len(problems))))
        options = {key: getattr(arguments, key) for key in ("max_tokens", "stop", "max_prompt_length", "prompt_format")}
        params = SamplingParams(temperature=0, max_tokens=arguments.max_tokens, stop=tuple(arguments.stop or ()))

        def answer(rows: list[dict[str, Any]]) -> list[dict[str, Any] | Dropped]:
            sample = sampler(
                self.engine,
                params,
                extract=extract_answer,
                match=answers_match,
                prompt_format=arguments.prompt_format,
                max_prompt_length=arguments.max_prompt_length,
            )
            return [finished_answer(item) for item in sample(rows)]

        self.run(
            "routing answers",
            answer,
            problems,
            self.folders["answers"],
            {
                **options,
                "split": arguments.split,
                "engine": self.engine_arguments.engine,
                "dtype": self.engine_arguments.dtype,
            },
        )

    def routed_answers(self) -> None:
        """The LLM's greedy choice at every position of completions that routed decoding has written."""
        arguments, engine_arguments = self.arguments, self.engine_arguments
        routed = load_stage(arguments.on_policy or "", split=arguments.split, tokenizer=self.tokenizer)
        for name in ("prompt", "answer", "prompt_ids", "completion_ids", "written_by"):
            if name not in routed.column_names:
                raise ContractError(
                    f"{arguments.on_policy} has no column `{name}`; make it with scripts/generate_routed.py."
                )
        if arguments.num_problems is not None:
            routed = routed.select(range(min(arguments.num_problems, len(routed))))
        scorer = cache(
            lambda: DivergenceScorer(
                engine_arguments.model,
                self.tokenizer,
                shared_vocab=self.shared_vocab,
                features=False,
                adapter=engine_arguments.adapter,
                token_budget=arguments.prefill_token_budget,
                dtype=engine_arguments.dtype,
                device_map=engine_arguments.device_map,
            )
        )
        parameters = {"split": arguments.split, "dtype": engine_arguments.dtype, "on_policy": True}
        self.run(
            "routing answers",
            lambda batch: add_llm_choices(scorer(), batch),
            routed,
            self.folders["answers"],
            parameters,
        )

    # ---------------------------------------------------------------------------------------------------- prefill

    def prefill(self) -> None:
        arguments = self.arguments
        rows = load_stage(self.folders["answers"], tokenizer=self.tokenizer)
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
        top_k = min(arguments.top_k, self.shared_vocab)
        self.run(
            "routing prefill",
            lambda batch: add_slm_choices(scorer(), batch, folder),
            rows,
            self.folders["prefill"],
            {"top_k": top_k, "shared_vocab": self.shared_vocab, "dtype": arguments.slm_dtype},
            features="features",
            hidden_size=self.models["slm"]["hidden_size"],
            top_k=top_k,
        )

    # --------------------------------------------------------------------------------------------------- branches

    @cached_property
    def rule(self) -> SentenceRule | None:
        """A judge reads the current sentence and one more; an outcome needs the whole answer."""
        return None if self.arguments.verdict == "outcome" else sentence_rule(self.tokenizer, self.shared_vocab)

    def branches(self) -> None:
        arguments = self.arguments
        rows = load_stage(self.folders["prefill"], tokenizer=self.tokenizer)
        outcome = arguments.verdict == "outcome"
        if outcome and "answer" not in rows.column_names:
            raise ContractError(
                f"{self.folders['prefill']} has no column `answer`, which --verdict outcome needs; build the problems "
                "with their answers, or use a judge."
            )
        grower = BranchGrower(
            grow=self.continued,
            outcome=outcome,
            rule=self.rule,
            max_tokens=arguments.branch_limit,
            most=arguments.max_branches_per_answer,
            seed=arguments.seed,
        )
        self.run(
            "routing branches",
            grower,
            rows,
            self.folders["branches"],
            {
                "verdict": arguments.verdict,
                "max_tokens": arguments.branch_limit,
                "stop": arguments.stop,
                "max_branches_per_answer": arguments.max_branches_per_answer,
                "seed": arguments.seed,
                "engine": self.engine_arguments.engine,
                "dtype": self.engine_arguments.dtype,
            },
            # Which branches the LLM wrote for this; the others are cut from its answers
            written=["slm_branch_ids", *(["llm_branch_ids"] if "llm_ids" in rows.column_names else [])],
        )

    def continued(self, forks: list[Fork]) -> list[tuple[list[int], str]]:
        return continue_forks(
            self.engine,
            forks,
            self.ends,
            max_tokens=self.arguments.branch_limit,
            stop=tuple(self.arguments.stop or ()),
            rule=self.rule,
            positions=self.engine_arguments.max_model_len or self.positions,
        )

    # ----------------------------------------------------------------------------------------------------- labels

    def labels(self) -> None:
        arguments = self.arguments
        rows = load_stage(self.folders["prefill"], tokenizer=self.tokenizer)
        grown = read_manifest(self.folders["branches"])
        if grown["parameters"]["verdict"] != arguments.verdict:
            raise ContractError(
                f"{self.folders['branches']} was grown for the verdict {grown['parameters']['verdict']!r}, not "
                f"{arguments.verdict!r}; choose that one or another folder."
            )
        none = grown.get("rows") == 0  # two models that agree everywhere
        branches = None if none else load_stage(self.folders["branches"], tokenizer=self.tokenizer)
        template, judge = load_judge_template(arguments.judge_template), _Judge(arguments, self.engine_arguments)

        def compare(comparisons: list[Comparison]) -> list[Verdict]:
            return judge_verdicts(judge.ask, template, comparisons, swap_order=arguments.swap_order)

        by_judge = compare if arguments.verdict == "judge" else None
        labeller = Labeller(BranchLookup(branches), self.tokenizer, by_judge, arguments.judge_context)
        main = process_state().is_main_process
        judged: dict[str, Any] = {"verdict": arguments.verdict}
        if arguments.verdict == "judge":
            judged |= {key: getattr(arguments, f"judge_{key}") for key in ("engine", "max_tokens", "context")}
            local = arguments.judge_engine != "server" and Path(arguments.judge or "").is_dir()
            judged["judge"] = weights_hash(arguments.judge or "") if local and main else arguments.judge
            judged["template"] = judge_template_hash(template)
            judged["swap_order"] = arguments.swap_order
        judged |= {"calibration_share": arguments.calibration_share, "test_share": arguments.test_share}
        # The job compares its input, which is the prefill stage; labels follow from the branches too
        judged["branches"] = content_hash(branches) if main and branches is not None else None
        parts = split_indices(rows["id"], arguments.calibration_share, arguments.test_share)
        try:
            for split in SPLITS:
                if not parts[split]:
                    if main:
                        print(f"No problem falls into the split {split}; it is not written.")
                    continue
                self.run(
                    f"routing labels {split}",
                    labeller,
                    rows.select(parts[split]),
                    self.folders["labels"] / split,
                    {**judged, "split": split},
                    features="../../prefill/features",
                    hidden_size=self.models["slm"]["hidden_size"],
                    top_k=min(arguments.top_k, self.shared_vocab),
                    judge=arguments.judge,
                )
        finally:
            judge.close()

    def report(self) -> None:
        """report.json, report.png and a table, from the finished stages."""
        splits = {s: self.folders["labels"] / s for s in SPLITS if (self.folders["labels"] / s).exists()}
        report = build_label_report(
            {name: self.folders[name] for name in STAGES[:3]}, splits, swap_order=self.arguments.swap_order
        )
        root = Path(self.arguments.output_dir)
        write_text_atomically(root / "report.json", json.dumps(report, indent=2) + "\n")
        plot_label_report(report, root / "report.png")
        print_label_report(report)


# ------------------------------------------------------------------------------------------------------------ parts


class _Judge:
    """The judge of the arguments, started by the first difference that it is asked about."""

    def __init__(self, arguments: LabelRoutingArguments, engine_arguments: EngineArguments):
        self.arguments, self.engine_arguments = arguments, engine_arguments
        self.engine: Engine | None = None

    @cached_property
    def ask(self) -> Ask:
        arguments, shared = self.arguments, self.engine_arguments
        model = arguments.judge or ""
        if arguments.judge_engine == "server":
            return server_judge(
                arguments.judge_base_urls or [],
                model,
                max_tokens=arguments.judge_max_tokens,
                api_key_env=shared.api_key_env,
                concurrency=shared.concurrency,
                timeout=shared.timeout,
                max_retries=shared.max_retries,
            )
        judge = replace(
            shared,
            model=model,
            engine=arguments.judge_engine,
            adapter=None,
            tokenizer=None,
            served_model=None,
            base_urls=arguments.judge_base_urls,
        )
        self.engine = load_engine(judge)
        return engine_judge(self.engine, max_tokens=arguments.judge_max_tokens)

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()


def main(arguments: LabelRoutingArguments, engine_arguments: EngineArguments) -> None:
    state = process_state()
    labelling = Labelling(arguments, engine_arguments)
    try:
        for stage in STAGES:
            if stage in arguments.stages:
                getattr(labelling, stage)()
                labelling.close()  # the next stage may need another model's memory
    finally:
        labelling.close()
    if "labels" in arguments.stages and state.is_main_process:
        labelling.report()


if __name__ == "__main__":
    parser = TrlParser((LabelRoutingArguments, EngineArguments))
    main(*parser.parse_args_and_config())
    end_processes()
