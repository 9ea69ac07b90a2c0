"""Generation with a transformers model on any device: continuous batching, its own decode loop.

* Requests are taken longest first; a batch holds as many rows as fit `token_budget` = rows × (prompt + max_tokens).
* Each distinct prompt is prefilled once, and its keys and values are repeated for its `n` rows.
* Finished rows leave the batch and waiting ones join it, so a few long rows do not hold up the rest.
* `continue_from_prefixes` prefills prompt + completion once; each prefix reads that cache through a mask that hides
  the slots after it (keys carry their rotary position, so a slot's place in memory does not matter).

Sliding-window, recurrent and other state caches cannot be padded or masked that way: for them a batch runs to its
end before the next one starts, and prefixes are generated as plain prompts.
"""

from __future__ import annotations

import inspect
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch.nn.functional import pad
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tokalign.generation.adapters import adapter_config
from tokalign.generation.arguments import EngineArguments
from tokalign.generation.batch import Batch, Plan, Prefilled, SampledRow
from tokalign.generation.cache import is_plain, new_cache
from tokalign.generation.constrained import Grammars
from tokalign.generation.protocol import (
    Completion,
    Ids,
    SamplingParams,
    check_prompts,
    params_of_each,
    prefixes_of,
    repeat_greedy,
)
from tokalign.generation.vocabulary import end_ids, unknown_ids
from tokalign.stage.processes import model_device

# Rows leave, and waiting ones join, once this share of the batch has finished or is free: each change copies the cache.
COMPACT_SHARE = 1 / 8
REFILL_SHARE = 1 / 4


class TransformersEngine:
    """`Engine` over a causal language model of transformers.

    Args:
        arguments: what to load and how.
        model: use this model instead of loading `arguments.model`, for instance one in training (with the adapter
            that is active on it).
        tokenizer: likewise.
    """

    def __init__(
        self,
        arguments: EngineArguments,
        *,
        model: PreTrainedModel | PeftModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.arguments = arguments
        trust = arguments.trust_remote_code
        self.tokenizer = tokenizer or AutoTokenizer.from_pretrained(
            arguments.tokenizer or arguments.model, trust_remote_code=trust
        )
        if model is None:
            model = AutoModelForCausalLM.from_pretrained(
                arguments.model,
                dtype=arguments.dtype,
                attn_implementation=arguments.attn_implementation,
                trust_remote_code=trust,
                device_map=arguments.device_map,
            )
            if arguments.device_map is None:
                model.to(model_device())  # type: ignore[arg-type]
            model.eval()
        if isinstance(model, PeftModel):  # its LoRA layers sit in the base, whose forward says what it takes
            model = cast(PreTrainedModel, model.get_base_model())
        self.model: Any = model
        self._peft: PeftModel | None = None
        self._adapters: dict[str, str] = {}
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.max_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.end_ids = sorted(end_ids(model.generation_config, self.tokenizer))
        self._unknown = unknown_ids(self.tokenizer, self.vocab_size)
        accepted = inspect.signature(model.forward).parameters
        self._accepts = {name for name in ("position_ids", "logits_to_keep") if name in accepted}
        # Only such caches can be padded, joined and masked inside.
        self._plain = "position_ids" in accepted and is_plain(model.config)
        self._grammars: Grammars | None = None

    def generate(
        self,
        prompts: Sequence[Ids],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        adapter: str | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.generate`. Greedy requests are decoded once and repeated `n` times."""
        each = params_of_each(params, len(prompts))
        check_prompts(prompts, self.vocab_size, self.max_length, each)
        rows = self._rows(prompts, each)
        with self._using(adapter):
            self._run(rows, self._prefill_prompts)
        return _collect(rows, each)

    def continue_from_prefixes(
        self,
        prompt_ids: Ids,
        completion_ids: Ids,
        lengths: Sequence[int],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        adapter: str | None = None,
        last_tokens: Ids | None = None,
    ) -> list[list[Completion]]:
        """Completions of `prompt_ids + completion_ids[:t]` for every t in `lengths`, from one prefill of the whole.

        Same result as `generate` on those prefixes, up to the rounding of the arithmetic's order. A last token that
        differs (`last_tokens`) costs nothing more: it is the one that is fed anew.
        """
        prefixes = prefixes_of(prompt_ids, completion_ids, lengths, last_tokens)
        if not self._plain:
            return self.generate(prefixes, params, adapter=adapter)
        each = params_of_each(params, len(prefixes))
        check_prompts(prefixes, self.vocab_size, self.max_length, each)
        rows = self._rows(prefixes, each)
        whole = max(prefixes, key=len, default=[])
        with self._using(adapter):
            shared: list[Any] = []

            def prefill(rows: list[SampledRow]) -> tuple[Prefilled, list[int]]:
                if not shared:
                    cache = new_cache(self.model.config)
                    ids = torch.tensor([whole], device=self.device)
                    self._forward(ids, cache, torch.ones_like(ids), torch.arange(len(whole), device=self.device))
                    shared.extend((keys, values) for keys, values, _ in cache)
                return self._prefill_prefixes(rows, shared)

            self._run(rows, prefill)
        return _collect(rows, each)

    def close(self) -> None:
        """Forget the model, so that its memory can be used again."""
        self.model = self._peft = None  # type: ignore[assignment]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def _rows(self, prompts: Sequence[Ids], each: list[SamplingParams]) -> list[SampledRow]:
        for i, params in enumerate(each):
            if params.json_schema is not None:  # compiled now, so that a bad one stops the call at once
                self._loaded_grammars().matcher(params.json_schema, i)
        rows: list[SampledRow] = []
        groups: dict[tuple[int, ...], int] = {}
        for i, (prompt, params) in enumerate(zip(prompts, each, strict=True)):
            seed = secrets.randbits(63) if params.seed is None else params.seed
            limit = params.max_tokens
            if self.max_length is not None:
                limit = min(limit, self.max_length - len(prompt))
            group = groups.setdefault(tuple(prompt), len(groups))
            rows += [SampledRow(i, group, prompt, params, seed, k, limit) for k in range(params.draws)]
        return rows

    def _loaded_grammars(self) -> Grammars:
        if self._grammars is None:
            self._grammars = Grammars(self.arguments.grammar_backend, self.tokenizer, self.vocab_size, self.end_ids)
        return self._grammars

    @torch.inference_mode()
    def _run(self, rows: list[SampledRow], prefill: Callable[[list[SampledRow]], tuple[Prefilled, list[int]]]) -> None:
        """Complete every row. Longest first: later rows then never widen the batch that they join."""
        if not rows:
            return
        plan = Plan(
            end_ids=self.end_ids,
            most_stops=max(1, len(self.end_ids) + max(len(row.params.stop_token_ids) for row in rows)),
            longest=max(row.limit for row in rows),
            bans=any(row.params.banned_token_ids for row in rows),
            unknown=torch.tensor(self._unknown, device=self.device) if self._unknown else None,
            stop_strings=any(row.params.stop for row in rows),
            plain=self._plain,
            grammars=self._grammars if any(row.params.json_schema is not None for row in rows) else None,
            penalties=any(row.params.penalized for row in rows),
            narrowed=any(row.params.top_k > 0 or row.params.min_p > 0 for row in rows),
            decode=lambda ids: self.tokenizer.batch_decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            ),
        )
        # Rows of one prompt stay together, so that it is prefilled once.
        waiting = deque(sorted(rows, key=lambda row: (row.width, row.group), reverse=True))
        batch: Batch | None = None
        while waiting or batch:
            # Waiting rows join when a good part of the budget is free, not one by one: each joining is a prefill and a
            # copy of the cache. A cache that is not plain cannot be padded, so there a batch runs to its end.
            if waiting and (batch is None or self._plain):
                width = max(waiting[0].width, batch.width if batch else 0)
                capacity = max(1, self.arguments.token_budget // width)
                free = capacity - (len(batch.rows) if batch else 0)
                if batch is None or free >= REFILL_SHARE * capacity:
                    admitted = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                    joining = Batch(admitted, *prefill(admitted), plan)
                    if batch is None:
                        batch = joining
                    else:
                        batch.join(joining)
            assert batch is not None
            done = batch.draw()
            if done == len(batch.rows) or done >= COMPACT_SHARE * len(batch.rows):
                batch.retire()
            if not batch.rows:
                batch = None
                continue
            # The token that was drawn is read next: its slot becomes visible, at the position after the row's last.
            batch.mask = pad(batch.mask, (0, 1), value=1)
            position = batch.columns["start"] + batch.columns["age"] - 1
            batch.logits = self._forward(batch.last, batch.cache, batch.mask, position[:, None])

    def _forward(
        self, ids: torch.Tensor, cache: DynamicCache, mask: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Extend `cache` by `ids` (B, T); logits of the last position, (B, V)."""
        if positions.dim() == 1:
            positions = positions[None]
        extra = {"position_ids": positions, "logits_to_keep": 1}
        extra = {name: value for name, value in extra.items() if name in self._accepts}
        output = self.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, return_dict=True, **extra
        )
        return output.logits[:, -1].to(ids.device)

    def _prefill_prompts(self, rows: list[SampledRow]) -> tuple[Prefilled, list[int]]:
        """Each distinct prompt of `rows` once, padded on the left, and which of them each row continues."""
        # Padded on the left, so that the next token of every prompt comes from the last column.
        place: dict[int, int] = {}
        which = [place.setdefault(row.group, len(place)) for row in rows]
        prompts = list({row.group: row.prompt for row in rows}.values())
        length = max(map(len, prompts))
        ids = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts], device=self.device)
        starts = torch.tensor([length - len(prompt) for prompt in prompts], device=self.device)[:, None]
        slots = torch.arange(length, device=self.device)
        mask = (slots >= starts).long()
        cache = new_cache(self.model.config)
        logits = self._forward(ids, cache, mask, (slots - starts).clamp_(min=0))
        return Prefilled(cache, mask, logits), which

    def _prefill_prefixes(
        self, rows: list[SampledRow], shared: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[Prefilled, list[int]]:
        """Each distinct prefix of `rows` from the `shared` keys and values (1, heads, L, d) of the longest one.

        The cache holds a prefix but its last token, which is fed again: its logits are the next token's.
        """
        place: dict[int, int] = {}
        which = [place.setdefault(row.group, len(place)) for row in rows]
        prompts = list({row.group: row.prompt for row in rows}.values())
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)[:, None]
        longest = max(map(len, prompts)) - 1
        cache = new_cache(self.model.config)
        if longest:
            for i, (keys, values) in enumerate(shared):
                keys, values = (x[:, :, :longest].expand(len(place), -1, -1, -1) for x in (keys, values))
                cache.update(keys, values, i)
        last = torch.tensor([[prompt[-1]] for prompt in prompts], device=self.device)
        mask = (torch.arange(longest, device=self.device) < lengths - 1).long()
        mask = pad(mask, (0, 1), value=1)
        logits = self._forward(last, cache, mask, lengths - 1)
        return Prefilled(cache, mask, logits), which

    @contextmanager
    def _using(self, adapter: str | None) -> Iterator[None]:
        """Evaluation mode with the adapter on; None is the engine's own adapter, or the base model alone."""
        adapter = adapter or self.arguments.adapter
        training = self.model.training
        self.model.eval()
        try:
            if adapter is not None:
                self._load_adapter(adapter)
                assert self._peft is not None
                self._peft.set_adapter(self._adapters[adapter], inference_mode=True)
                yield
            elif self._peft is not None:
                with self._peft.disable_adapter():
                    yield
            else:
                yield
        finally:
            self.model.train(training)

    def _load_adapter(self, path: str) -> None:
        if path in self._adapters:
            return
        config = adapter_config(path, self.model.config.name_or_path)
        config.inference_mode = True
        name = f"adapter_{len(self._adapters)}"
        try:
            if self._peft is None:  # LoRA layers are put into self.model itself; this object only steers them
                self._peft = PeftModel(self.model, config, adapter_name=name)
            self._peft.load_adapter(path, adapter_name=name, is_trainable=False)
        except (RuntimeError, ValueError) as error:
            if self._peft is not None and not self._adapters:
                self._peft.unload()
                self._peft = None
            elif self._peft is not None and name in self._peft.peft_config:
                self._peft.delete_adapter(name)
            raise ValueError(
                f"Adapter {path} does not fit the layers of {self.arguments.model}: use it with the base that it was "
                "trained on."
            ) from error
        self._adapters[path] = name


def _collect(rows: list[SampledRow], each: list[SamplingParams]) -> list[list[Completion]]:
    """Completions by request, in the caller's order."""
    results: list[list[Completion]] = [[] for _ in each]
    for row in rows:
        assert row.completion is not None
        results[row.request].append(row.completion)
    return repeat_greedy(results, each)
