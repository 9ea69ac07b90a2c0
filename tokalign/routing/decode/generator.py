"""Routed decoding on transformers: two models write one completion (R2R, arXiv 2505.21600).

`RoutedGenerator` holds the pair and its policy; `RoutedBatch` (schedule.py) decodes on it, in continuous batches.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tokalign.generation.protocol import Completion, Ids, SamplingParams, check_prompts, params_of_each
from tokalign.generation.vocabulary import check_pair, end_ids
from tokalign.internals.transformers import base_of, file_or_none
from tokalign.routing.decode.backend import RoutedStats, RoutedToken, RowFailed
from tokalign.routing.decode.policies import NeverLLM, RouterPolicy, RoutingPolicy
from tokalign.routing.decode.schedule import RoutedBatch
from tokalign.routing.decode.slots import check_model, layer_kinds
from tokalign.routing.decode.verify import VerifiedBatch
from tokalign.stage.processes import model_device


@dataclass
class RoutedCompletion(Completion):
    """One completion and who wrote it.

    Attributes:
        written_by: for each token whether the LLM wrote it.
        scores: the policy's score for each token; None where the SLM was not asked.
        agreed: with `verify`, for each token whether the SLM had drawn the same; None where it was not asked.
        stats: the work of both models for this completion. A prompt that several completions share counts once, in
            the first of them.
    """

    written_by: list[bool] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)
    agreed: list[bool | None] = field(default_factory=list)
    stats: RoutedStats = field(default_factory=RoutedStats)


class RoutedGenerator:
    """A small and a large causal LM, and the policy that chooses between them.

    Args:
        slm, llm: models of one tokenizer, on any devices. They are put into evaluation mode.
        tokenizer: the SLM's.
        policy: see `tokalign.routing.decode.policies`. It is attached to the SLM: a router is moved beside it.
        llm_span: most tokens that the LLM writes in a row before the SLM is asked again, if the policy does not say.
        verify: every token is the LLM's own choice; the SLM only drafts, as far as the policy lets it (`verify.py`).
        most_draft: longest draft.
        on_verified: with `verify`, called when a completion ends: all its ids, prompt included, and for each token of
            the completion whether the SLM had drawn the same (None: not asked). Labels of text that is served.
        llm_wait: the LLM runs when so many rows wait for it, or when no other can go on; 0 or 1 is at once. "auto"
            finds the number from the measured times of both models (see `decode.pace`). It changes no row's tokens,
            except where the last bits of half-precision logits depend on the rows of a pass: a number repeats them.
        prefill_chunk: most tokens of long prompts that a step reads beside the rows that write. Some hundred cost a GPU
            little more than one, since all weights are read for either; many more would be felt as a pause.
        token_budget: most slots for prompts and what is written so far (see `slots.slots_for`: at least 256 a row, and
            at most half too many); bounds both KV caches. Rows that outgrow it wait, the youngest first, and are read
            anew.
        max_rows: most rows in flight.
        llm_tokenizer: the LLM's, to be compared; None if it is known to be the same.

    Raises:
        ValueError: tokenizers that differ, models whose cache cannot be extended row by row, a router of another SLM.
    """

    def __init__(
        self,
        slm: PreTrainedModel,
        llm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        policy: RoutingPolicy,
        *,
        llm_span: int = 1,
        verify: bool = False,
        most_draft: int = 16,
        on_verified: Callable[[list[int], list[bool | None]], None] | None = None,
        llm_wait: int | str = "quarter",
        prefill_chunk: int = 512,
        token_budget: int = 65536,
        max_rows: int = 256,
        llm_tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        if llm_span < 1:
            raise ValueError(f"llm_span is {llm_span}: let the LLM write at least the 1 token that is routed to it.")
        if verify and llm_span > 1:
            raise ValueError(
                f"llm_span is {llm_span}: with verify the LLM writes 1 token behind each draft, leave it out."
            )
        for name, number in (("max_rows", max_rows), ("prefill_chunk", prefill_chunk), ("most_draft", most_draft)):
            if number < 1:
                raise ValueError(f"{name} is {number}: allow at least 1.")
        if llm_wait not in ("auto", "quarter") and not str(llm_wait).isdecimal():
            raise ValueError(f'llm_wait is {llm_wait!r}: give a number of rows, "quarter" or "auto".')
        self.llm_wait = llm_wait if llm_wait in ("auto", "quarter") else int(llm_wait)
        self.prefill_chunk = prefill_chunk
        self.slm, self.llm, self.tokenizer, self.policy = slm.eval(), llm.eval(), tokenizer, policy
        self.llm_span, self.token_budget, self.max_rows = llm_span, token_budget, max_rows
        self.verify, self.most_draft, self.on_verified = verify, most_draft, on_verified
        configs = [model.config.get_text_config() for model in (slm, llm)]
        self.shared_vocab = check_pair(tokenizer, llm_tokenizer or tokenizer, *[c.vocab_size for c in configs])
        # A model that never runs does not limit the length either.
        runs = [config for config, used in zip(configs, self._used(), strict=True) if used]
        limits = [getattr(config, "max_position_embeddings", None) for config in runs]
        self.max_length: int | None = min((limit for limit in limits if limit is not None), default=None)
        # Each model ends a completion by its own end tokens, as it does alone.
        self.end_ids = [end_ids(model.generation_config, tokenizer) for model in (slm, llm)]
        for model, used in zip((slm, llm), self._used(), strict=True):
            (check_model if used else layer_kinds)(model)
        policy.attach(slm, tokenizer)

    @property
    def prompts(self) -> dict[str, Any] | None:
        """How the prompts of the labels were rendered that the router was trained on; None if that is not known."""
        return self.policy.router.config.prompts if isinstance(self.policy, RouterPolicy) else None

    @classmethod
    def from_pretrained(
        cls,
        slm: str,
        llm: str,
        router: str | None = None,
        *,
        policy: RoutingPolicy | None = None,
        threshold: float | None = None,
        score: Literal["argmax", "drawn"] = "argmax",
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        llm_device_map: Any = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> RoutedGenerator:
        """Load a pair and a router, each by hub id or folder; a model may be a LoRA adapter's folder.

        Args:
            router: a trained `TokenRouter`; or give a `policy`.
            threshold: instead of the one that is stored with the router.
            score: which token the router sees when the SLM samples, see `RouterPolicy`.
            device_map: where the SLM goes, e.g. "cuda:0" or "auto"; None is this process's device.
            llm_device_map: where the LLM goes; None is `device_map`.
            options: of the constructor.

        Raises:
            ValueError: neither or both of router and policy, or a pair that does not fit (see the constructor).
        """
        if (router is None) == (policy is None):
            raise ValueError("Give either a router or a policy: one of them decides who writes a token.")
        if (threshold is not None or score != "argmax") and router is None:
            name = "score" if threshold is None else "threshold"
            raise ValueError(f"{name} belongs to a router: give the policy its own, e.g. EntropyPolicy(1.5).")
        device = model_device()
        # An adapter's folder need not have the tokenizer.
        holders = [p if file_or_none(p, "tokenizer_config.json") else base_of(p) for p in (slm, llm)]
        tokenizers = [AutoTokenizer.from_pretrained(p, trust_remote_code=trust_remote_code) for p in holders]
        models = []
        for path, place in ((slm, device_map), (llm, device_map if llm_device_map is None else llm_device_map)):
            model = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                device_map=place,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
            )
            models.append(model.to(device) if place is None else model)  # type: ignore[arg-type]
        if router is not None:
            from tokalign.routing.router.model import TokenRouter

            loaded = TokenRouter.from_pretrained(router)
            loaded.check_slm(slm)
            policy = RouterPolicy(loaded, threshold, score=score)
        assert policy is not None
        return cls(models[0], models[1], tokenizers[0], policy, llm_tokenizer=tokenizers[1], **options)

    def generate(
        self, prompts: Sequence[Ids], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[list[RoutedCompletion]]:
        """Completions of every prompt in the caller's order, `params.n` of them each.

        Greedy requests are decoded once and repeated.

        Args:
            prompts: token ids, one sequence a prompt.
            params: one for all prompts, or one each.

        Raises:
            ValueError: one sentence naming the row, for a prompt or parameters that the pair cannot serve.
        """
        each = params_of_each(params, len(prompts))
        self.check(prompts, each)
        batch = self.batch()
        place: dict[int, tuple[int, int]] = {}
        seeds = [secrets.randbits(63) if p.seed is None else p.seed for p in each]
        # Longest first: the end of a batch is then of rows that end soon.
        widths = [len(prompt) + p.max_tokens for prompt, p in zip(prompts, each, strict=True)]
        for i in sorted(range(len(prompts)), key=lambda i: (-widths[i], i)):
            for k in range(each[i].draws):
                place[batch.add(prompts[i], replace(each[i], seed=seeds[i]), sample=k)] = (i, k)
        results: list[dict[int, RoutedCompletion]] = [{} for _ in each]
        written: dict[int, list[RoutedToken]] = {key: [] for key in place}
        while batch:
            for key, token, stats in batch.step():
                i, k = place[key]
                if isinstance(token, RowFailed):
                    raise ValueError(f"Prompt {i}: {token}") from token
                written[key].append(token)
                if token.finish_reason is not None:
                    results[i][k] = _completion(written.pop(key), stats)
        ordered = [[draws[k] for k in sorted(draws)] for draws in results]
        return [
            [_copy(draws[0]) for _ in range(p.n)] if p.greedy else draws for draws, p in zip(ordered, each, strict=True)
        ]

    def stream(self, prompt: Ids, params: SamplingParams, *, sample: int = 0) -> Iterator[RoutedToken]:
        """One completion token by token: draw number `sample` of the request, the same as from `generate`."""
        self.check([prompt], [params])
        batch = self.batch()
        batch.add(prompt, params, sample=sample)
        while batch:
            for _, token, _ in batch.step():
                if isinstance(token, RowFailed):
                    raise token
                yield token

    def check(self, prompts: Sequence[Ids], each: Sequence[SamplingParams]) -> None:
        """Refuse, naming the row, what the pair cannot continue: see `generate`."""
        check_prompts(prompts, self.shared_vocab, self.max_length, each)
        for row, params in enumerate(each):
            for name in ("json_schema", "banned_token_ids"):
                if getattr(params, name):
                    raise ValueError(
                        f"Prompt {row} has {name}, which routed decoding does not apply: leave it out, or generate "
                        "with one model."
                    )

    def _used(self) -> tuple[bool, bool]:
        """Whether the policy ever runs the SLM and the LLM."""
        return self.policy.needs_slm, self.verify or not isinstance(self.policy, NeverLLM)

    def batch(self) -> RoutedBatch:
        """An empty batch on this pair."""
        return VerifiedBatch(self) if self.verify else RoutedBatch(self)


def _completion(tokens: list[RoutedToken], stats: RoutedStats) -> RoutedCompletion:
    return RoutedCompletion(
        token_ids=[token.id for token in tokens],
        logprobs=[token.logprob for token in tokens if token.logprob is not None],
        finish_reason=tokens[-1].finish_reason or "length",
        written_by=[token.by_llm for token in tokens],
        scores=[token.score for token in tokens],
        agreed=[token.agreed for token in tokens],
        stats=stats,
    )


def _copy(one: RoutedCompletion) -> RoutedCompletion:
    lists: dict[str, Any] = {
        name: list(getattr(one, name)) for name in ("token_ids", "logprobs", "written_by", "scores", "agreed")
    }
    return replace(one, **lists, stats=replace(one.stats))
