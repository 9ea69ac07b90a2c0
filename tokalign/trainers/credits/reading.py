"""What several credit functions read: the policy's own numbers of a batch, and those of a frozen model beside it.

A *batch* is what TRL's `_generate_and_score_completions` gives: `prompt_ids` (B, P) padded on the left,
`completion_ids` (B, T) padded on the right, their masks, and `tool_mask` where tools were called. A frozen model is a
copy of its own in every process, loaded once, on the process's device: it is no part of the policy, so nothing trains
or saves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from peft import PeftConfig
from transformers import AutoTokenizer

from tokalign.generation.scorer import CompletionScorer
from tokalign.internals.transformers import file_or_none, is_fsdp_enabled, unset_hf_deepspeed_config
from tokalign.stage.hashes import added_tokens, other_tokenizer, tokenizer_hash

Batch = Mapping[str, Any]
Scorer = TypeVar("Scorer", bound=CompletionScorer)


def loss_mask(batch: Batch) -> torch.Tensor:
    """(B, T) ones where the loss is: no padding, no results of tools, no completion that TRL masks as truncated."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def group_size(trainer: Any) -> int:
    """Completions of one prompt that lie next to each other in a batch."""
    return (trainer.num_generations if trainer.model.training else trainer.num_generations_eval) or 1


def policy_logps(trainer: Any, batch: Batch) -> torch.Tensor:
    """log π(y_t|x, y_<t) (B, T) of the policy in nats, at TRL's temperature: TRL's own where it has made them."""
    made = batch.get("old_per_token_logps")
    return _policy_reads(trainer, batch)[0].float() if made is None else made


def policy_entropies(trainer: Any, batch: Batch) -> torch.Tensor:
    """Entropy of π(·|x, y_<t) (B, T) in nats, at TRL's temperature."""
    return _policy_reads(trainer, batch, compute_entropy=True)[1].float()


@torch.no_grad()
def _policy_reads(trainer: Any, batch: Batch, **options: Any) -> Any:
    """One forward by TRL's own rule, in its micro-batches and through its fused head: it works where TRL's does (LoRA,
    ZeRO-3, FSDP) and holds no (B, T, V) tensor."""
    _refuse_images(batch)
    args = trainer.args
    return trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        batch["completion_ids"].shape[1],
        batch_size=args.per_device_train_batch_size if trainer.model.training else args.per_device_eval_batch_size,
        **options,
    )


def frozen(trainer: Any, scorer: type[Scorer], option: str, path: str, **arguments: Any) -> Scorer:
    """A scorer of `tokalign.signals` with weights that are whole, never trained and never saved.

    Args:
        trainer: whose tokenizer and device count.
        scorer: its class.
        option: what named the model, for errors.
        path: of the base model.
        arguments: what else the class takes.

    Raises:
        ValueError: another tokenizer than the policy's, weights that FSDP would load into one process alone, or an
            adapter of another base.
    """
    if is_fsdp_enabled():
        raise ValueError(
            f"{option} is read whole by every process, which FSDP prevents: set fsdp_cpu_ram_efficient_loading to "
            "false in the accelerate configuration."
        )
    _check_tokenizer(trainer, option, path)
    with _unpartitioned(trainer):
        made = scorer(path, trainer._tokenizer, **arguments)
    made.base.requires_grad_(False)
    return made


def base_and_adapter(path: str, option: str) -> tuple[str, str | None]:
    """(model, adapter) of the path or hub id of either; the adapter is None where it is a model.

    Raises:
        ValueError: there is nothing under the path that `option` gave, and no answer from the hub.
    """
    try:
        adapter = file_or_none(path, "adapter_config.json")
        known = adapter is not None or file_or_none(path, "config.json") is not None
    except OSError:  # its text is the hub's, of several lines
        adapter, known = None, False
    if not known:
        raise ValueError(
            f"`{option}` is {path!r}, which is no model's folder here and no model that the hub gives; check the path, "
            "or the hub id and the token for it."
        )
    if adapter is None:
        return path, None
    return str(PeftConfig.from_pretrained(path).base_model_name_or_path), path


def read(batch: Batch, score: Callable[[list[list[int]], list[list[int]]], list[list[float]]]) -> torch.Tensor:
    """(B, T) numbers of a batch's completions, 0 at padding.

    Args:
        score: prompts' and completions' ids -> one list a row, one number a completion token.
    """
    _refuse_images(batch)
    prompts = _without_padding(batch["prompt_ids"], batch["prompt_mask"])
    completions = _without_padding(batch["completion_ids"], batch["completion_mask"])
    result = torch.zeros(batch["completion_ids"].shape)
    rows = [row for row, ids in enumerate(completions) if ids]  # TRL empties what it masks as truncated
    scores = score([prompts[row] for row in rows], [completions[row] for row in rows])
    for row, values in zip(rows, scores, strict=True):
        result[row, : len(values)] = torch.tensor(values)
    return result.to(batch["completion_ids"].device)


def named_path(trainer: Any, given: str | None, option: str, what: str) -> str:
    """The path that was given, else the configuration's `option`.

    Raises:
        ValueError: neither is there.
    """
    path = given or getattr(trainer.args, option)
    if not path:
        raise ValueError(f"{what}: give its path or hub id as `{option}`.")
    return path


def _without_padding(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[kept].tolist() for row, kept in zip(ids, mask.bool(), strict=True)]


def _refuse_images(batch: Batch) -> None:
    if "pixel_values" in batch:
        raise ValueError("This credit function reads text alone: train without images, or leave it out of `credit`.")


def _check_tokenizer(trainer: Any, option: str, base: str) -> None:
    """Another tokenizer's ids are most often inside the vocabulary, so nothing would fail but the numbers."""
    if file_or_none(base, "tokenizer_config.json") is None:
        raise ValueError(
            f"{option}: there is no tokenizer beside {base}, so nobody can tell what its ids mean; save it."
        )
    theirs = AutoTokenizer.from_pretrained(base)
    manifest = {"tokenizer_hash": tokenizer_hash(theirs), "added_tokens": added_tokens(theirs)}
    if (reason := other_tokenizer(manifest, trainer._tokenizer)) is not None:
        raise ValueError(
            f"{option}: {base} reads token ids otherwise than the policy ({reason}); choose a model with the policy's "
            "tokenizer."
        )


@contextmanager
def _unpartitioned(trainer: Any) -> Iterator[None]:
    """Models that are loaded here stay whole under ZeRO-3, which else hands each process a part of every weight."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    if plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        plugin.set_deepspeed_weakref()
