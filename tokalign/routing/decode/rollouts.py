"""The stage of routed rollouts: verified completions of a pair, with who wrote each token, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tokalign.generation.protocol import Completion, Ids, SamplingParams
from tokalign.generation.rollouts import sampler, without_unknown_ids
from tokalign.routing.decode.backend import RoutedStats
from tokalign.routing.decode.costs import activated_parameters, full_cost, weight_reads
from tokalign.routing.decode.generator import RoutedCompletion, RoutedGenerator
from tokalign.routing.decode.policies import RouterPolicy, ValuePolicy
from tokalign.stage.hashes import known_ids
from tokalign.stage.jobs import Dropped, Kept
from tokalign.stage.shards import shard_name

WORK = ("handoffs", "slm_positions", "llm_positions")  # columns of `RoutedStats` beside the writers
VERIFIED = ("drafted",)  # and where the LLM verifies


class _Recorder:
    """The generator as an engine that keeps its last completions, for the columns that plain rollouts do not have."""

    def __init__(self, generator: RoutedGenerator):
        self.tokenizer, self.max_length = generator.tokenizer, generator.max_length
        self.generator = generator
        self.last: list[list[RoutedCompletion]] = []

    def generate(
        self,
        prompts: Sequence[Ids],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        adapter: str | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.generate`; a pair takes no adapter."""
        self.last = self.generator.generate(prompts, params)
        return [list(completions) for completions in self.last]

    def close(self) -> None:
        """The pair is the caller's."""


def routed_sampler(
    generator: RoutedGenerator, params: SamplingParams, **options: Any
) -> Callable[[list[dict]], list[list[dict] | Kept | Dropped]]:
    """`tokalign.generation.rollouts.sampler` of a pair, for a job.

    Rows get `written_by` (1 where the LLM wrote the token), `scores` (the policy's; null where the SLM was not asked)
    and the work of both models (`WORK`). Where the LLM verifies, also `drafted` and `agreed` (whether the SLM had drawn
    the same token; null where it was not asked): labels of the LLM's own text.

    Args:
        options: of `sampler`, `extract` and `match` among them.
    """
    recorder: Any = _Recorder(generator)  # as much of an engine as the sampler asks for
    sample = sampler(recorder, params, keep_unknown=True, **options)
    known = known_ids(generator.tokenizer)

    def routed(problems: list[dict[str, Any]]) -> list[list[dict[str, Any]] | Kept | Dropped]:
        items = sample(problems)
        # The engine was asked for the problems that were not dropped, in their order
        rows = [row for item in items if isinstance(item, list) for row in item]
        completions = [completion for each in recorder.last for completion in each]
        for row, completion in zip(rows, completions, strict=True):
            row["written_by"] = [int(by_llm) for by_llm in completion.written_by]
            row["scores"] = completion.scores
            for name in (*WORK, *VERIFIED) if generator.verify else WORK:
                row[name] = getattr(completion.stats, name)
            if generator.verify:
                row["agreed"] = completion.agreed
        return [without_unknown_ids(item, known) if isinstance(item, list) else item for item in items]

    return routed


def pair_parameters(generator: RoutedGenerator) -> dict[str, int]:
    """Parameters of the SLM, the LLM and the router or value head; 0 for a policy that has none."""
    policy = generator.policy
    router = policy.router.num_parameters() if isinstance(policy, RouterPolicy) else 0
    if isinstance(policy, ValuePolicy):
        router = sum(parameter.numel() for parameter in policy.head.parameters())
    return {"slm": generator.slm.num_parameters(), "llm": generator.llm.num_parameters(), "router": router}


def routing_summary(folder: str | Path, manifest: dict[str, Any], parameters: dict[str, int]) -> dict[str, Any]:
    """LLM rate, costs and speed of a finished stage, read from its rows, whichever runs wrote them.

    Args:
        folder, manifest: of the stage.
        parameters: see `pair_parameters`.

    Returns:
        The sums of `RoutedStats`, and if anything was written `llm_rate`, `activated_parameters`, `full_cost` and
        `weight_reads` (parameters a token, see `tokalign.routing.decode.costs`) and `tokens_per_second` of one process.
    """
    stats = RoutedStats()
    for index in range(manifest["shards"]):
        file = pq.ParquetFile(Path(folder) / shard_name(index, manifest["shards"]))
        work = [name for name in (*WORK, *VERIFIED) if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=256, columns=["written_by", *work]) if manifest["rows"] else ():
            for row in batch.to_pylist():
                by_llm = sum(row["written_by"])
                stats += RoutedStats(len(row["written_by"]) - by_llm, by_llm, *[row[name] for name in work])
    report: dict[str, Any] = {"parameters": parameters, **asdict(stats)}
    if stats.tokens:
        report["llm_rate"] = stats.llm_rate
        report["activated_parameters"] = activated_parameters(stats, parameters["slm"], parameters["llm"])
        report["full_cost"] = full_cost(stats, parameters["slm"], parameters["llm"], parameters["router"])
        report["weight_reads"] = weight_reads(stats, parameters["slm"], parameters["llm"], parameters["router"])
        report["tokens_per_second"] = stats.tokens / max(manifest["seconds"], 1e-3)
    return report
