"""Rewards from a sequence-classification model: the judge of T-REG's on-policy pairs (arXiv 2412.02685).

Any `AutoModelForSequenceClassification` will do. It reads prompt and completion as a conversation, as text rendered by
its own chat template: it is another model than the policy, so the policy's ids mean nothing to it. Rows are batched by
length and padded on the right; the reward of a row is the one that the model gives it alone, up to rounding.

A model with code of its own may return `score` beside several objectives (ArmoRM); that is its reward then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tokalign.internals.transformers import let_old_code_load
from tokalign.prompts import render_prompt
from tokalign.stage.batching import batches_by_length
from tokalign.stage.errors import ContractError
from tokalign.stage.processes import model_device

Messages = list[dict[str, str]]


class RewardModel:
    """One number for a prompt and a completion, by a sequence-classification model.

    Args:
        model: hub id or path of the model, with its tokenizer.
        reward_index: which output is the reward, for a model with several.
        chat_template: Jinja text used in place of the tokenizer's own chat template.
        token_budget: tokens of one forward pass, padding included; a longer row goes alone.
        dtype: of the weights ("auto": as stored).
        device_map: `"auto"` spreads a large model over all visible GPUs; None is this process's device.
        trust_remote_code: run the code that comes with the checkpoint.

    Raises:
        ValueError: a checkpoint whose head was never trained, no chat template, several outputs and no index.
    """

    def __init__(
        self,
        model: str,
        *,
        reward_index: int | None = None,
        chat_template: str | None = None,
        token_budget: int = 8192,
        dtype: str | torch.dtype = "auto",
        device_map: str | None = None,
        trust_remote_code: bool = False,
    ):
        self.name = model
        self.reward_index = reward_index
        self.token_budget = token_budget
        self.tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        if chat_template is not None:
            self.tokenizer.chat_template = chat_template
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"The tokenizer of {model} has no chat template, which says how this reward model reads a prompt and "
                "an answer: give one with --reward_chat_template."
            )
        if trust_remote_code:
            let_old_code_load()
        self.model, loading = AutoModelForSequenceClassification.from_pretrained(
            model,
            dtype=dtype,
            device_map=device_map or model_device(),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        if loading["missing_keys"]:
            raise ValueError(
                f"{model} has no trained weight {sorted(loading['missing_keys'])[0]!r}, so its outputs are noise: use "
                "a model that was trained to give rewards."
            )
        self.model.eval()
        config = self.model.config.get_text_config()
        self.pad_id: int | None = config.pad_token_id
        self.device = self.model.get_input_embeddings().weight.device
        lengths = (getattr(config, "max_position_embeddings", None), self.tokenizer.model_max_length)
        self.max_length = min(length for length in lengths if length is not None)
        self._check_outputs()

    def encode(
        self, prompt: str | Messages, completion: str, *, name: str = "", tools: list[Any] | str | None = None
    ) -> list[int]:
        """This model's ids of the conversation that ends with `completion`.

        Args:
            prompt: messages, or the user's message as a string.
            completion: the assistant's answer, as text.
            name: what to call the row in errors.
            tools: what the prompt offered, or their JSON text.

        Raises:
            ValueError: the chat template refuses the conversation (for example a system message).
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [*messages, {"role": "assistant", "content": completion}]
        try:
            return render_prompt(messages, self.tokenizer, tools=tools, add_generation_prompt=False)
        except ContractError as error:
            raise ValueError(
                f"Row {name}: the chat template of {self.name} refuses the conversation ({error.__cause__ or error}): "
                "give another with --reward_chat_template, or change the prompts."
            ) from error

    def problem(self, ids: Sequence[int]) -> str | None:
        """Why a row is to be dropped (the same words for all such rows, so that they can be counted), or None."""
        if len(ids) > self.max_length:
            return f"prompt and completion are longer than the reward model's {self.max_length} positions"
        return None

    def score(self, rows: Sequence[Sequence[int]], *, names: Sequence[str] | None = None) -> list[float]:
        """Rewards of encoded rows.

        Args:
            rows: ids from `encode`.
            names: what to call the rows in errors; their index if absent.

        Returns:
            One finite number a row, in the given order, in the model's own units.

        Raises:
            ValueError: a row that `problem` refuses, or a reward that is not finite.
        """
        labels = list(names) if names is not None else [str(i) for i in range(len(rows))]
        for label, row in zip(labels, rows, strict=True):
            if (reason := self.problem(row)) is not None:
                raise ValueError(f"Row {label}: {reason}; drop the row or shorten it.")
        rewards = [math.nan] * len(rows)
        for batch in self._batches([len(row) for row in rows]):
            for index, reward in zip(batch, self._forward([rows[i] for i in batch]).tolist(), strict=True):
                if not math.isfinite(reward):
                    raise ValueError(
                        f"Row {labels[index]}: the reward of {self.name} is {reward}; score in fp32 (--dtype float32), "
                        "or check the model's weights."
                    )
                rewards[index] = reward
        return rewards

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of the rows of each forward pass."""
        return batches_by_length(lengths, self.token_budget)

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """(B,) fp32 rewards of one padded batch."""
        width = max(len(row) for row in rows)
        pad_id = self._padding(rows)
        input_ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        output = self.model(input_ids=input_ids.to(self.device), attention_mask=mask.to(self.device), return_dict=True)
        score = getattr(output, "score", None)
        if score is not None and self.reward_index is None:
            return score.float().reshape(len(rows))
        logits = output.logits.float().reshape(len(rows), -1)
        self._check_index(logits.shape[1])
        return logits[:, self.reward_index or 0]

    def _padding(self, rows: Sequence[Sequence[int]]) -> int:
        """The model's padding id; for a model without one, an id that none of the rows holds.

        Such a model takes the last position of a row that it reads alone, and no batch at all. It finds the last
        position of each row once it is told of a padding id. Not the tokenizer's: that is often the end token, which
        the rows end with, and the model would read the reward one position too early.
        """
        if self.pad_id is not None:
            return self.pad_id
        used = {token for row in rows for token in row}
        unused = next(i for i in range(len(used) + 1) if i not in used)
        self.model.config.pad_token_id = self.model.config.get_text_config().pad_token_id = unused
        return unused

    def _check_index(self, outputs: int) -> None:
        if self.reward_index is None and outputs > 1:
            labels = ", ".join(f"{i} {label}" for i, label in self.model.config.id2label.items())
            raise ValueError(
                f"{self.name} has {outputs} outputs ({labels}): say with --reward_index which is the reward."
            )
        if self.reward_index is not None and not 0 <= self.reward_index < outputs:
            raise ValueError(
                f"--reward_index is {self.reward_index}, but {self.name} has {outputs} outputs: use 0 to {outputs - 1}."
            )

    def _check_outputs(self) -> None:
        """One forward pass on a made-up row, so that a wrong index stops the run before its first shard."""
        self._forward([self.encode("?", "!")])
