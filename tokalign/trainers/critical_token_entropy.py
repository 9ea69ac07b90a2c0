"""The policy's entropy where reasoning branches, logged in training, to select checkpoints by (Skywork-R1V3, §5.1).

    H_t = − Σ_v π(v|x, y_<t) log π(v|x, y_<t)     in nats, of the distribution that gives token y_t

averaged over the *critical* tokens: those at which a branch word begins ("Wait", "Alternatively"), or those that a
token signal marks. H_t belongs to the position before the token: how open the choice was, not what follows it. Two
sources:

- the training batches (the rollouts in RL): a forward hook reads the entropies that TRL's fused LM head computes
  anyway, so it costs no forward pass. Forwards of the reference and GRPO's old-policy passes are left out;
- a probe: a fixed dataset, scored by the policy at every log, evaluation and checkpoint, comparable over time and runs.

A word counts where all of its tokens stand in the completion, and then once, at its first token. What a tool or an
environment wrote into a completion is no choice of the policy's and counts nowhere: TRL's tool mask says what that is.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from tokalign.internals.peft import adapters_are_off
from tokalign.stage.batching import batches_by_length
from tokalign.stage.contract import check_reading, check_tokenizer, reader_of
from tokalign.stage.errors import ContractError
from tokalign.stage.files import write_text_atomically
from tokalign.stage.hashes import ALLOW_OTHER_TOKENIZER, content_hash
from tokalign.stage.manifest import manifest_of

BRANCH_WORDS = ("Wait", "Alternatively")
NAME = "critical_token_entropy"  # of the logged value, the file beside the checkpoints, and the entry in their state
IGNORED = -100  # label of a token that is not part of a completion
_BATCH = 256  # probe rows in memory at a time while checking


class CriticalTokenEntropyCallback(TrainerCallback):
    """
    A [`~transformers.TrainerCallback`] that logs the policy's entropy at critical tokens during training with a TRL
    trainer ([`~trl.GRPOTrainer`], [`~trl.DPOTrainer`], [`~trl.SFTTrainer`] and those of this package), full or with
    adapters, on one process or several.

    Each training log gets `critical_token_entropy` (mean in nats; absent if there was no critical token),
    `critical_token_count` and `completion_entropy` (mean over all completion tokens), each evaluation the same with
    its prefix. With `metric_for_best_model="critical_token_entropy"` in the training arguments the checkpoint is
    selected by it: by the `Trainer` if it evaluates, else by this callback at every save. Each save also writes
    `critical_token_entropy.json` into the output folder. A resumed run goes on as if it had not been interrupted.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer to watch; add the callback with its `add_callback`.
        words (`Sequence[str]`, *optional*, defaults to `("Wait", "Alternatively")`):
            Words at which reasoning branches, case-sensitive; each is looked for at the start of a text, after a space
            and after a line break.
        probe ([`~datasets.Dataset`], *optional*):
            Rows to score instead of the training batches: `prompt_ids` and `<side>_ids`.
        side (`str`, *optional*, defaults to `"completion"`):
            Which ids of the probe are the completion: `"completion"`, `"chosen"` or `"rejected"`.
        signal (`str`, *optional*):
            Token signal that marks critical tokens in the place of words: the probe's column `<side>_<signal>`.
        threshold (`float`, *optional*):
            A token is critical where the signal is at most this (signals are low on critical tokens).
        token_budget (`int`, *optional*, defaults to `16384`):
            Most rows × longest row of a probe batch; a longer single row is a batch of its own.

    Raises:
        ValueError: arguments that do not go together, or a word that the vocabulary cannot spell.
        ContractError: a probe with a missing column, bad ids or scores, too long rows, or no critical token.
        RuntimeError: while training, if the trainer does not compute entropies.

    Example:

    ```python
    >>> trainer = GRPOTrainer("Qwen/Qwen3-8B", reward_funcs=reward, args=args, train_dataset=problems)
    >>> trainer.add_callback(CriticalTokenEntropyCallback(trainer, words=["Wait", "Alternatively", "But"]))
    >>> trainer.train()
    ```
    """

    def __init__(
        self,
        trainer: Trainer,
        words: Sequence[str] | None = None,
        *,
        probe: Dataset | None = None,
        side: str = "completion",
        signal: str | None = None,
        threshold: float | None = None,
        token_budget: int = 16384,
    ):
        if isinstance(words, str):
            raise ValueError(f"`words` must be a list of words, got the string {words!r}; write [{words!r}].")
        if signal is not None and (words is not None or probe is None):
            raise ValueError(
                "`signal` marks critical tokens in a probe and in the place of words; pass `probe` and leave `words`."
            )
        if (signal is None) != (threshold is None):
            raise ValueError("`signal` and `threshold` go together: a token is critical where signal <= threshold.")
        self.trainer: Any = trainer
        tokenizer: Any = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        self._signal, self._threshold = signal, math.nan if threshold is None else threshold
        self._forms: list[list[int]] = []
        self._definition: dict[str, Any] = {"signal": f"{side}_{signal}", "threshold": threshold}
        if signal is None:
            words = list(BRANCH_WORDS if words is None else words)
            self._forms = word_forms(tokenizer, words)
            self._definition = {"words": words, "token_ids": self._forms}
        self._memory = self._new_memory()
        self._step: torch.Tensor | float = 0.0  # this process's totals of the optimizer step in progress
        self._evaluation: Any = None  # and of the evaluation in progress
        self._last_forward: torch.Tensor | None = None
        self._tool_mask: torch.Tensor | None = None  # (B, T) of the loss in progress, 1 on the policy's own tokens
        self._probed: list[float] | None = None  # totals of the probe at the current step
        self._probe: Any = None
        if probe is not None:
            self._columns = ["prompt_ids", f"{side}_ids", *([] if signal is None else [f"{side}_{signal}"])]
            self._batches = list(batches_by_length(self._check_probe(probe, tokenizer), token_budget))
            self._probe = probe.select_columns(self._columns)
            self._definition["probe"] = content_hash(self._probe)
        else:
            # The module that DDP, DeepSpeed and FSDP wrap and call, whose hooks they run
            policy = self.trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
            self._adapter = policy.active_adapter if isinstance(policy, PeftModel) else None
            policy.register_forward_hook(self._see, with_kwargs=True)
            self._trainer_loss = trainer.compute_loss
            trainer.compute_loss = self._compute_loss  # type: ignore[method-assign]
        # Reporting callbacks stand before all others, so `on_log` would come too late for them
        self._trainer_log = trainer.log
        trainer.log = self._log  # type: ignore[method-assign]

    def _new_memory(self) -> dict[str, Any]:
        """What a resumed run needs: totals over all processes, and what has been recorded."""
        empty = [0.0] * 4
        return {"critical": self._definition, "since_log": empty, "since_save": empty, "evaluation": {}, "saves": []}

    # ------------------------------------------------------------------------------------------- training batches

    def _compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """`trainer.compute_loss`, whose inputs know what the model's do not: which tokens tools wrote."""
        self._tool_mask = inputs.get("tool_mask")
        try:
            return self._trainer_loss(model, inputs, *args, **kwargs)
        finally:
            self._tool_mask = None  # passes outside the loss have other rows

    def _see(self, module: Any, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
        """Keep the totals of the policy's last forward; only the fused LM head gives entropies.

        A micro-batch's loss makes its one policy forward after all others of the policy (GRPO's old-policy log-probs),
        so whatever the last one is when the micro-batch ends is what it trained on. The reference may come later.
        """
        entropy, labels = getattr(output, "entropy", None), keywords.get("labels")
        if entropy is None or labels is None:
            return
        # The reference by the same module: adapters switched off, or TRL's "ref" copy of the adapter in their place
        if isinstance(module, PeftModel) and (adapters_are_off(module) or module.active_adapter != self._adapter):
            return
        labels = labels[:, 1:]
        if self._tool_mask is not None:
            prompt = torch.ones_like(labels[:, : labels.shape[1] - self._tool_mask.shape[1]])
            labels = labels.masked_fill(torch.cat([prompt, self._tool_mask], dim=1) == 0, IGNORED)
        entropy = entropy.detach()[:, -labels.shape[1] :]  # prompt-learning PEFT puts virtual tokens first
        self._last_forward = entropy_totals(entropy, labels != IGNORED, form_starts(labels, self._forms))

    def _take(self) -> torch.Tensor:
        """Totals (4,) of the micro-batch that has just ended, on this process."""
        if self._last_forward is None:
            raise RuntimeError(
                "No forward of the policy gave per-token entropies, so there is nothing to log: the trainer is not "
                "TRL's, splits sequences over processes, or calls a compiled model around its hooks; pass a `probe`."
            )
        taken, self._last_forward = self._last_forward, None
        return taken

    def _over_processes(self, totals: torch.Tensor) -> list[float]:
        return self.trainer.accelerator.reduce(totals, reduction="sum").tolist()

    def on_substep_end(self, args, state, control, **kwargs):
        if self._probe is None:
            self._step = self._step + self._take()

    def on_step_end(self, args, state, control, **kwargs):
        if self._probe is not None:
            self._probed = None
            return
        # Summed over processes at every step: rank 0's checkpoint then holds what all of them have seen
        totals, self._step = self._over_processes(self._step + self._take()), 0.0
        for window in ("since_log", "since_save"):
            self._memory[window] = [a + b for a, b in zip(self._memory[window], totals, strict=True)]

    def on_prediction_step(self, args, state, control, **kwargs):
        if self._probe is None:
            self._evaluation = (0.0 if self._evaluation is None else self._evaluation) + self._take()

    def on_predict(self, args, state, control, metrics: Any = None, **kwargs):
        self._evaluation = None

    # ---------------------------------------------------------------------------------------------------- logging

    def _log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """`trainer.log`, with the entropies added to the logs of training steps and of evaluations."""
        if "loss" in logs:
            totals = self._memory["since_log"] if self._probe is None else self._probe_totals()
            self._memory["since_log"] = [0.0] * 4
            logs.update(means(totals))
        elif (prefix := _evaluation_prefix(logs)) and (self._probe is not None or self._evaluation is not None):
            totals = self._over_processes(self._evaluation) if self._probe is None else self._probe_totals()
            self._evaluation = None
            values = {f"{prefix}_{key}": value for key, value in means(totals).items()}
            logs.update(values)
            before, step = self._memory["evaluation"], self.trainer.state.global_step
            self._memory["evaluation"] = (before if before.get("step") == step else {"step": step}) | values
        self._trainer_log(logs, start_time)

    def on_evaluate(self, args, state, control, metrics: Any = None, **kwargs):
        prefix = _evaluation_prefix(metrics)
        if prefix is not None:
            # Where no critical token was met: NaN is never the best, and the `Trainer` needs a number to compare
            metrics.setdefault(f"{prefix}_{NAME}", math.nan)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def on_train_begin(self, args, state, control, **kwargs):
        self._step, self._last_forward, self._evaluation, self._probed = 0.0, None, None, None
        saved = state.stateful_callbacks.get(NAME)
        if saved is not None and saved["critical"] != json.loads(json.dumps(self._definition)):
            raise ValueError(
                f"The checkpoint's {NAME} was measured on other tokens ({_brief(saved['critical'])}, not "
                f"{_brief(self._definition)}), so values would not compare; resume with its words, signal and probe."
            )
        self._memory = saved or self._new_memory()
        state.stateful_callbacks[NAME] = self._memory  # saved with the checkpoint
        if saved is not None:
            self._record(args, state)  # what `on_save` did after this checkpoint's state had been written
            if state.best_model_checkpoint is not None and not os.path.isdir(state.best_model_checkpoint):
                state.best_model_checkpoint = None  # as the `Trainer` does; resumed into another output folder

    def on_save(self, args, state, control, **kwargs):
        self._record(args, state)

    def _record(self, args: Any, state: Any) -> None:
        """Note the value of the checkpoint just saved, make it the best if it is, and write the file for people."""
        totals = self._memory["since_save"] if self._probe is None else self._probe_totals()
        self._memory["since_save"] = [0.0] * 4
        name = f"checkpoint-{state.global_step}"
        values = means(totals)
        if self._memory["evaluation"].get("step") == state.global_step:
            values |= self._memory["evaluation"]
        # A policy that has diverged gives NaN, which is neither JSON nor a best value
        values = {key: value for key, value in values.items() if math.isfinite(value)}
        entry: dict[str, Any] = {"checkpoint": name, "step": state.global_step} | values
        self._memory["saves"].append(entry)
        ours = args.metric_for_best_model in (NAME, f"eval_{NAME}")
        if ours and args.eval_strategy == "no" and NAME in entry:  # with evaluations the `Trainer` selects
            value, best = entry[NAME], state.best_metric
            if best is None or (value > best if args.greater_is_better else value < best):
                state.best_metric, state.best_global_step = value, state.global_step
                state.best_model_checkpoint = os.path.join(args.output_dir, name)
        if state.is_world_process_zero:
            best_step = state.best_global_step if ours else None
            best_names = [save["checkpoint"] for save in self._memory["saves"] if save["step"] == best_step]
            content = {
                "critical": self._definition,
                "best": best_names[0] if best_names else None,
                "checkpoints": self._memory["saves"],
            }
            text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
            write_text_atomically(Path(args.output_dir) / f"{NAME}.json", text)

    # ------------------------------------------------------------------------------------------------------ probe

    def _check_probe(self, probe: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Lengths of the probe's rows, after looking at all of them."""
        for column in self._columns:
            if column not in probe.column_names:
                raise ContractError(
                    f"The probe has no column `{column}` (it has {', '.join(probe.column_names)}); choose another "
                    "`side` or `signal`, or add it."
                )
        allow = getattr(self.trainer.args, ALLOW_OTHER_TOKENIZER, False)
        check_tokenizer(manifest_of(probe), tokenizer, "the probe", allow=allow)
        reader = reader_of(probe, tokenizer)
        positions = getattr(self.trainer.model.config.get_text_config(), "max_position_embeddings", None)
        lengths: list[int] = []
        critical = 0
        for batch in probe.select_columns(self._columns).iter(batch_size=_BATCH):
            for values in zip(*(batch[column] for column in self._columns), strict=True):  # type: ignore[call-overload]
                self._check_row(len(lengths), *values, known=reader.known, positions=positions)
                critical += int(self._mark(*values[1:]).sum())
                lengths.append(len(values[0]) + len(values[1]))
        if not allow:
            check_reading(probe, reader, self._columns[:2])
        if critical == 0:
            raise ContractError(f"The probe holds no critical token ({_brief(self._definition)}); choose other rows.")
        return lengths

    def _check_row(
        self, row: int, prompt: list, completion: list, scores: list | None = None, *, known: np.ndarray, positions: Any
    ) -> None:
        for column, ids in zip(self._columns, (prompt, completion), strict=False):
            if not ids:
                raise ContractError(f"Row {row} of the probe: `{column}` is empty; drop the row.")
            if wrong := [i for i in ids if i is None or not 0 <= i < len(known) or not known[i]]:
                raise ContractError(
                    f"Row {row} of the probe: `{column}` holds {wrong[0]}, not an id of this tokenizer's "
                    f"{known.sum()} tokens; rebuild it with this model's."
                )
        if positions is not None and len(prompt) + len(completion) > positions:
            raise ContractError(
                f"Row {row} of the probe: `{self._columns[1]}` with its prompt has {len(prompt) + len(completion)} "
                f"tokens but the model holds {positions} positions; drop the row."
            )
        if self._signal is None:
            return
        if scores is None or len(scores) != len(completion):
            raise ContractError(
                f"Row {row} of the probe: `{self._columns[2]}` has {len(scores or [])} scores for {len(completion)} "
                f"ids in `{self._columns[1]}`; score these rows again."
            )
        if wrong := [s for s in scores if s is None or not math.isfinite(s)]:
            raise ContractError(
                f"Row {row} of the probe: `{self._columns[2]}` holds {wrong[0]}, not a finite number; score it again."
            )

    def _mark(self, completion: list[int], scores: list[float] | None = None) -> torch.Tensor:
        """Which tokens of a probe row's completion are critical, booleans (T,): by the signal's scores, or by words."""
        if scores is not None:
            return torch.tensor(scores) <= self._threshold
        return form_starts(torch.tensor([completion]), self._forms)[0]

    def _probe_totals(self) -> list[float]:
        """Totals of the probe under the policy as it is, over all processes; once a step of training."""
        trainer = self.trainer
        if self._probed is not None and trainer.is_in_train:
            return self._probed
        model, accelerator = trainer.model_wrapped, trainer.accelerator
        training = trainer.model.training
        model.eval()
        totals = torch.zeros(4, device=accelerator.device)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            for first in range(0, len(self._batches), accelerator.num_processes):
                index = first + accelerator.process_index
                # ZeRO-3 and FSDP gather weights in every forward of every process, so one without a batch repeats
                # the last one and does not count it
                batch = self._probe_batch(self._batches[min(index, len(self._batches) - 1)], accelerator.device)
                critical = batch.pop("critical")
                entropy = model(**batch, fused_lm_head=True).entropy[:, -critical.shape[1] :]
                if index < len(self._batches):
                    totals += entropy_totals(entropy, batch["labels"][:, 1:] != IGNORED, critical)
        model.train(training)
        self._probed = self._over_processes(totals)
        return self._probed

    def _probe_batch(self, rows: list[int], device: torch.device) -> dict[str, torch.Tensor]:
        """Inputs (B, L) of the policy, padded on the right, and the critical tokens (B, L − 1) beside the next ids."""
        ids, labels, marks = [], [], []
        for row in rows:
            example = self._probe[row]
            prompt, completion, *scores = (example[column] for column in self._columns)
            ids.append(torch.tensor([*prompt, *completion]))
            labels.append(torch.tensor([IGNORED] * len(prompt) + completion))
            marks.append(torch.cat([torch.zeros(len(prompt), dtype=torch.bool), self._mark(completion, *scores)]))
        lengths = torch.tensor([len(row) for row in ids])[:, None]
        padded = pad_sequence(ids, batch_first=True)
        batch = {
            "input_ids": padded,
            "attention_mask": (torch.arange(padded.shape[1])[None] < lengths).long(),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "critical": pad_sequence(marks, batch_first=True)[:, 1:],
        }
        return {name: tensor.to(device) for name, tensor in batch.items()}


# ----------------------------------------------------------------------------------------------------------- parts


def word_forms(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[list[int]]:
    """Token ids that spell each word at the start of a text, after a space and after a line break, without repeats.

    Tokens that are nothing but space are left out, so that a form begins with the token that begins the word.

    Raises:
        ValueError: no words, or one that every spelling turns into the unknown token.
    """

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if not words:
        raise ValueError("`words` is empty; name at least one branch word.")
    forms: dict[tuple[int, ...], None] = {}
    before = ids_of("x")
    for word in words:
        spellings = [ids_of(word.strip())]
        # Behind another letter, since tokenizers treat space at the start of a text in their own ways
        for context in ("x ", "x\n"):
            ids = ids_of(context + word.strip())
            if ids[: len(before)] == before:
                spellings.append(ids[len(before) :])
        found: dict[tuple[int, ...], None] = {}
        for ids in spellings:
            while ids and not str(tokenizer.decode(ids[:1])).strip():
                ids = ids[1:]
            if ids and tokenizer.unk_token_id not in ids:
                found[tuple(ids)] = None
        if not found:
            raise ValueError(
                f"The vocabulary cannot spell the word {word!r} (it becomes the unknown token); take it out of `words` "
                "or write it as the model does."
            )
        forms |= found
    return [list(ids) for ids in forms]


def form_starts(ids: torch.Tensor, forms: Sequence[Sequence[int]]) -> torch.Tensor:
    """Where one of `forms` begins in the ids (B, T): booleans (B, T)."""
    starts = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    for form in forms:
        width = max(0, ids.shape[1] - len(form) + 1)
        found = torch.ones_like(starts[:, :width])
        for offset, token in enumerate(form):
            found &= ids[:, offset : offset + width] == token
        starts[:, :width] |= found
    return starts


def entropy_totals(entropy: torch.Tensor, completion: torch.Tensor, critical: torch.Tensor) -> torch.Tensor:
    """(B, T) entropies and masks -> (4,): sum and count over critical tokens, sum and count over the completion's."""
    entropy, critical = entropy.float(), critical & completion
    parts = [(entropy * mask).sum() for mask in (critical, completion)]
    return torch.stack([parts[0], critical.sum().float(), parts[1], completion.sum().float()])


def means(totals: Sequence[float]) -> dict[str, float]:
    """What is logged of totals (4,); a mean over no token is left out."""
    critical, critical_count, everywhere, count = totals
    values = {NAME: critical / critical_count} if critical_count else {}
    return (
        values
        | {"critical_token_count": critical_count}
        | ({"completion_entropy": everywhere / count} if count else {})
    )


def _evaluation_prefix(logs: Mapping[str, Any]) -> str | None:
    """ "eval" or what else an evaluation's metrics begin with, which its speed metrics tell; None for other logs."""
    prefixes = [key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")]
    return prefixes[0] if prefixes and prefixes[0] != "train" else None


def _brief(definition: Mapping[str, Any]) -> str:
    if "words" in definition:
        text = f"words {', '.join(definition['words'])}"
    else:
        text = f"`{definition['signal']}` <= {definition['threshold']}"
    return text + (f" in probe {definition['probe'][:12]}" if "probe" in definition else "")
