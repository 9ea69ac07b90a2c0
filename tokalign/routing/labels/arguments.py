"""The arguments of labelling, for `TrlParser`; the LLM and its engine are those of `EngineArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tokalign.prompts import PromptArguments

STAGES = ("answers", "prefill", "branches", "labels")


@dataclass
class LabelArguments(PromptArguments):
    """Problems, small model, stages and their folder."""

    slm: str = field(metadata={"help": "Small model: hub id or path."})
    output_dir: str = field(metadata={"help": "Folder of the stages and the report."})
    dataset: str | None = field(default=None, metadata={"help": "Problems stage: folder or hub id."})
    on_policy: str | None = field(
        default=None,
        metadata={"help": "Stage of `tokalign generate`: its completions are labelled instead of LLM answers."},
    )
    stages: list[str] = field(
        default_factory=lambda: ["answers", "prefill", "branches", "labels"],
        metadata={"help": "Which to run: answers, prefill, branches, labels."},
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
    top_k: int = field(default=100, metadata={"help": "Largest logits of the SLM kept a position (paper: 100)."})
    slm_dtype: str = field(default="auto", metadata={"help": "Type of the SLM's weights."})
    prefill_token_budget: int = field(default=16384, metadata={"help": "Tokens of one forward pass, padding included."})
    calibration_share: float = field(default=0.1, metadata={"help": "Share of problems that set the threshold."})
    test_share: float = field(default=0.1, metadata={"help": "Share of problems that only the report sees."})
    seed: int = field(default=0, metadata={"help": "Seed of max_branches_per_answer; answers are greedy."})
    shard_size: int = field(
        default=32, metadata={"help": "Answers a shard: what a kill can lose. Their features are in memory at a time."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
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


@dataclass
class VerdictArguments:
    """How branches are grown, and who compares them."""

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

    def __post_init__(self) -> None:
        if self.verdict == "judge" and self.judge is None:
            raise ValueError("--verdict judge needs --judge, the model that compares branches.")
        if self.verdict == "judge" and self.judge_engine in ("server", "openai") and not self.judge_base_urls:
            raise ValueError("A judge on a server needs --judge_base_urls, e.g. http://localhost:8000/v1.")
