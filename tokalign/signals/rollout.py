"""Rollout estimate of critical tokens (critical-token DPO, arXiv 2411.19943v3, section 3.1): the costly ground truth.

For every prefix y_≤t of an incorrect trajectory, N continuations are sampled; the score of t is the share of them that
ends in the right answer. The critical token is the first t whose score is 0 and after which all scores stay below 5 %.

The ablation of section 2: pass@k from the prefix *with* the critical token, and from the prefix *without* it, where
the next token is drawn from the model's own distribution with the critical token masked out. Deviation: both sides
draw fresh samples. The token was chosen because its continuations failed, so the samples that chose it would make the
first curve 0, whatever the token does.

The command is `tokalign score rollout` (`tokalign.cli.rollout`), since right answers are told by `tokalign.rewards`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokalign.generation.protocol import Completion, Engine, SamplingParams, continue_from_prefixes
from tokalign.stage.jobs import Dropped
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import read_manifest, write_manifest
from tokalign.stage.seeds import derived_seed
from tokalign.statistics import pass_at_k_report

Verify = Callable[[list[int]], bool]  # ids of a whole completion -> does it end in the right answer?


@dataclass(frozen=True)
class RolloutEstimate:
    """Continuations of every prefix of one completion.

    Attributes:
        correct: right continuations of the prefix that ends with token t, for every t.
        n: continuations a prefix.
        tokens: tokens that went through the model: one prefill of prompt and completion, shared by all prefixes, and
            every sampled token.
    """

    correct: list[int]
    n: int
    tokens: int

    @property
    def accuracy(self) -> list[float]:
        return [count / self.n for count in self.correct]


@dataclass(frozen=True)
class Ablation:
    """Right continuations, of `n` each, with the critical token and without it; `tokens` as in `RolloutEstimate`."""

    with_correct: int
    without_correct: int
    n: int
    tokens: int


def critical_position(rollout_accuracy: Sequence[float], *, threshold: float = 0.05) -> int | None:
    """First t whose score is 0 and after which all scores stay below `threshold`; None if there is none.

    Args:
        rollout_accuracy: score of every completion token, shares in [0, 1].
        threshold: the paper's 5 %.

    Raises:
        ValueError: a score that is not in [0, 1].
    """
    first = None
    for t in range(len(rollout_accuracy) - 1, -1, -1):
        score = rollout_accuracy[t]
        if not 0 <= score <= 1:
            raise ValueError(f"The rollout accuracy of token {t} is {score}, not a share in [0, 1]: estimate it again.")
        if score == 0:
            first = t
        if score >= threshold:  # nothing before this token can be followed by low scores only
            break
    return first


def rollout_estimate(
    engine: Engine,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    verify: Verify,
    *,
    n: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_tokens: int = 512,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    end_ids: Collection[int] | None = None,
    adapter: str | None = None,
) -> RolloutEstimate:
    """Rollout estimate of one completion.

    Args:
        engine: continues the prefixes; a KV cache of the completion is shared by them where the engine can.
        prompt_ids, completion_ids: the incorrect trajectory.
        verify: whether the ids of a whole completion end in the right answer.
        n: continuations a prefix (the paper's 64).
        temperature, top_p, max_tokens, stop, adapter: of the continuations, see `SamplingParams`.
        seed: fixes all of them; every prefix gets its own seed from it.
        end_ids: ids that end a completion (default: the tokenizer's end token). The continuation of a prefix that has
            ended is the prefix itself.

    Raises:
        ValueError: an empty completion, or what the engine refuses.
    """
    if len(completion_ids) == 0:
        raise ValueError("The completion is empty, so there is no prefix to continue: drop the row.")
    ended = completion_ids[-1] in _end_ids(engine, end_ids)
    lengths = list(range(1, len(completion_ids) + (0 if ended else 1)))
    params = [
        SamplingParams(
            n=n,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            seed=derived_seed(seed, "prefix", length),
            stop=stop,
        )
        for length in lengths
    ]
    check = _remembering(verify)
    continued = continue_from_prefixes(engine, prompt_ids, completion_ids, lengths, params, adapter=adapter)
    correct = [
        _count(check, completion_ids[:length], completions)
        for length, completions in zip(lengths, continued, strict=True)
    ]
    if ended:
        correct.append(n if check(list(completion_ids)) else 0)
    sampled = sum(len(c.token_ids) for completions in continued for c in completions)
    return RolloutEstimate(correct, n, len(prompt_ids) + len(completion_ids) + sampled)


def rollout_accuracy(
    engine: Engine, prompt_ids: Sequence[int], completion_ids: Sequence[int], verify: Verify, **options: Any
) -> list[float]:
    """Share of right continuations of every prefix y_≤t: `rollout_estimate(…).accuracy`, options as there."""
    return rollout_estimate(engine, prompt_ids, completion_ids, verify, **options).accuracy


def pass_at_k_ablation(
    engine: Engine,
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    critical_index: int,
    verify: Verify,
    *,
    n: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_tokens: int = 512,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    end_ids: Collection[int] | None = None,
    adapter: str | None = None,
) -> Ablation:
    """Right continuations with the critical token, and without it (masked out of the next token's distribution).

    Args as in `rollout_estimate`; `critical_index` as from `critical_position`.
    """
    if not 0 <= critical_index < len(completion_ids):
        raise ValueError(
            f"critical_index is {critical_index} but the completion has {len(completion_ids)} tokens: "
            "pass an index of critical_position."
        )
    token = completion_ids[critical_index]
    prefix, through = list(completion_ids[:critical_index]), list(completion_ids[: critical_index + 1])

    def options(name: str) -> dict[str, Any]:
        common = {"n": n, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "stop": stop}
        return {**common, "seed": derived_seed(seed, name)}

    lengths = [critical_index]
    params = [SamplingParams(banned_token_ids=(token,), banned_steps=1, **options("without"))]
    ended = token in _end_ids(engine, end_ids)
    if not ended:
        lengths.append(critical_index + 1)
        params.append(SamplingParams(**options("with")))
    check = _remembering(verify)
    continued = continue_from_prefixes(engine, prompt_ids, completion_ids, lengths, params, adapter=adapter)
    with_token = (n if check(through) else 0) if ended else _count(check, through, continued[1])
    sampled = sum(len(c.token_ids) for completions in continued for c in completions)
    return Ablation(with_token, _count(check, prefix, continued[0]), n, len(prompt_ids) + len(through) + sampled)


def estimated_rows(
    rows: Iterable[dict[str, Any]],
    engine: Engine,
    matches: Callable[[str, str], bool],
    sampling: Mapping[str, Any],
    *,
    threshold: float,
    seed: int,
) -> Iterator[dict[str, Any] | Dropped]:
    """Rows of preferences with the estimate of their rejected side, and the ablation at its critical token.

    Adds `rejected_rollout_accuracy`, `critical_index` (−1: none), `with_correct` and `without_correct` (right ones of
    `n` fresh continuations; −1: none) and `rollout_tokens` (through the model, for the estimate alone).

    Args:
        rows: with an `answer`.
        matches: whether a completion's text ends in the answer beside it.
        sampling: `n`, `temperature`, `top_p`, `max_tokens`, `stop`, as of `rollout_estimate`.
    """
    positions = getattr(engine, "max_length", None)
    for row in rows:
        prompt_ids, rejected_ids, answer = row["prompt_ids"], row["rejected_ids"], row["answer"]
        if not rejected_ids:
            yield Dropped("the rejected completion is empty")
            continue
        if positions is not None and len(prompt_ids) + len(rejected_ids) >= positions:
            yield Dropped(f"no room for a continuation in the model's {positions} positions")
            continue

        def verify(ids: list[int], answer: str = answer) -> bool:
            return matches(str(engine.tokenizer.decode(ids, skip_special_tokens=True)), answer)

        if verify(list(rejected_ids)):
            yield Dropped("the rejected completion has the right answer")
            continue
        # By content, so that two pairs of one problem differ and a shard's place does not matter
        options = {**sampling, "seed": derived_seed(seed, row["id"], tuple(rejected_ids))}
        estimate = rollout_estimate(engine, prompt_ids, rejected_ids, verify, **options)
        index = critical_position(estimate.accuracy, threshold=threshold)
        result = {
            **row,
            "rejected_rollout_accuracy": estimate.accuracy,
            "critical_index": -1,
            "with_correct": -1,
            "without_correct": -1,
            "rollout_tokens": estimate.tokens,
        }
        if index is not None:
            counts = pass_at_k_ablation(engine, prompt_ids, rejected_ids, index, verify, **options)
            result["critical_index"] = index
            result["with_correct"], result["without_correct"] = counts.with_correct, counts.without_correct
        yield result


def summarise(folder: str | Path, n: int) -> None:
    """How many critical tokens a finished stage has, into its manifest; its pass@k as JSON and figure beside it."""
    manifest = read_manifest(folder)
    if not manifest["rows"]:
        return
    rows = load_stage(folder)
    critical = [i for i, index in enumerate(rows["critical_index"]) if index >= 0]
    write_manifest(folder, {**manifest, "critical_tokens_found": len(critical)})
    print(f"{len(critical)} of {len(rows)} wrong answers have a critical token.")
    if critical:
        with_token = rows.select(critical)
        curves = pass_at_k_curves(with_token["with_correct"], with_token["without_correct"], n)
        (Path(folder) / "pass_at_k.json").write_text(json.dumps(curves, indent=2) + "\n", encoding="utf-8")
        plot_pass_at_k(curves, Path(folder) / "pass_at_k.png")


def _end_ids(engine: Engine, end_ids: Collection[int] | None) -> Collection[int]:
    return (engine.tokenizer.eos_token_id,) if end_ids is None else end_ids


def _remembering(verify: Verify) -> Verify:
    """Many continuations are the same text, and verifying mathematics costs more than looking it up."""
    known: dict[tuple[int, ...], bool] = {}

    def check(ids: list[int]) -> bool:
        key = tuple(ids)
        if key not in known:
            known[key] = bool(verify(ids))
        return known[key]

    return check


def _count(check: Verify, prefix: Sequence[int], completions: Sequence[Completion]) -> int:
    return sum(check([*prefix, *completion.token_ids]) for completion in completions)


def pass_at_k_curves(with_correct: Sequence[int], without_correct: Sequence[int], n: int) -> dict[str, Any]:
    """pass@k with and without the critical token for k = 1, 2, 4 … n, with 95 % bootstrap intervals over problems.

    Args:
        with_correct, without_correct: right continuations of `n`, one pair a problem.
    """
    counts = [n] * len(with_correct)
    return {
        "n": n,
        "problems": len(counts),
        "with": pass_at_k_report(counts, with_correct),
        "without": pass_at_k_report(counts, without_correct),
    }


def plot_pass_at_k(curves: dict[str, Any], path: str | Path) -> None:
    """Figure of `pass_at_k_curves`, lines with their bands, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, color in (("without", "tab:blue"), ("with", "tab:red")):
        ks = [point["k"] for point in curves[name]]
        axes.plot(ks, [point["mean"] for point in curves[name]], "o-", color=color, label=f"{name} the critical token")
        low, high = zip(*(point["ci95"] for point in curves[name]), strict=True)
        axes.fill_between(ks, low, high, color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel="k", ylabel="pass@k", ylim=(-0.02, 1.02), title=f"{curves['problems']} wrong solutions, 95 % band")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.legend()
    figure.savefig(path, dpi=150)
