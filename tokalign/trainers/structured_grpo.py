"""GRPO with structured-output rewards (after RL-Struct, arXiv 2512.00319) on TRL's `GRPOTrainer`.

    A_i = (R_i − mean_G R) / (std_G R + ε),     R = Σ_c w_c R_c     over the components of `StructuredReward`

TRL samples, normalises and optimises; this adds the reward that the configuration describes (any reward functions may
stand beside it), one key for where rollouts come from, and what one wants to see: every component at each logging step
(the curriculum: validity before structure before content), the share of groups in which a component is 0 for all (it
then teaches nothing, and a warning says what to change), a warning where a component falls below where training began,
and, in evaluation alone, a baseline under constrained decoding.

With `credit: field` a completion's tokens do not share A_i: those of a field answer for that field alone
(`tokalign.trainers.credits.field`). `credit: sequence` is the equation above.

`multi_objective_aggregation: normalize_then_sum` (GDPO, arXiv 2601.05242) normalises each component within its group
before they are summed with their weights: the components become reward functions of their own that share one reading.

Adapters: `GRPOTrainer`, which this is, merges LoRA into the weights that it hands to vLLM, and unmerges. TRL's
asynchronous GRPO trainer hands over the adapter alone.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, IterableDataset
from tqdm import tqdm
from trl import is_conversational

from tokalign.generation.constrained import is_byte_encoded
from tokalign.rewards import StructuredReward
from tokalign.rewards.structured.documents.document import Limits
from tokalign.rewards.structured.reward import ComponentReward
from tokalign.stage.contract import first_row
from tokalign.stage.errors import ContractError
from tokalign.trainers.credits.field import FieldCredit
from tokalign.trainers.token_credit_grpo import PER_TOKEN_LOSSES, TokenCreditGRPOConfig, TokenCreditGRPOTrainer

logger = get_logger(__name__)
ROLLOUTS = ("transformers", "vllm-colocate", "vllm-server")
CREDIT = "sequence"  # where the configuration says nothing
FALL = 0.05  # a component is worse than at the start if its mean lies so far below it
START = 5  # logs whose mean is where training began
PLATEAU = 0.9  # share of groups without a single point in a component, from which on it is stuck
REMEDIES = {
    "structure": "show the schema or an example in the prompt, or start from an SFT checkpoint (`tokalign sft`)",
    "format": "say in the prompt whether a Markdown fence is wanted, or set `fence: optional`",
    "validity": "raise `max_completion_length` if completions are cut (completions/clipped_ratio), ask in the prompt "
    "for the document alone, or start from an SFT checkpoint (`tokalign sft`)",
    "schema": "show the schema in the prompt, or loosen its bounds and patterns until some completions meet them",
    "correctness": "raise `num_generations`, start with easier problems, or compare free text by `text_match: tokens`",
    "length": "widen `min_length` and `max_length` (characters)",
}


@dataclass
class StructuredGRPOConfig(TokenCreditGRPOConfig):
    r"""
    Configuration class for the [`StructuredGRPOTrainer`].

    This class includes only the parameters that are specific to structured output. For the others, please refer to
    the [`TokenCreditGRPOConfig`] and the [`~trl.GRPOConfig`] documentation. The ones of the reward are explained at
    [`~tokalign.rewards.StructuredReward`].

    Parameters:
        > Parameters that control the rollouts

        rollouts (`str`, *optional*):
            Where completions come from. Possible values are: `"transformers"` (this process's own model),
            `"vllm-colocate"` (vLLM in this process) and `"vllm-server"` (started with `trl vllm-serve`). Sets
            `use_vllm` and `vllm_mode`; if unset, those hold.

        > Parameters that control the credit

        credit (`list[str]`, *optional*):
            `"sequence"` gives all tokens of a completion its advantage, `"field"` gives the tokens of a field the
            field's own ([`FieldCredit`]); other credit functions may stand beside it. If unset, `"sequence"`.
        credit_coefficient (`float`, *optional*):
            λ: with `"field"` the factor of the fields beside the form.

        > Parameters that control the reward

        schema (`str`, *optional*):
            JSON Schema for all rows: the path of a JSON file, JSON text, or a Pydantic model as `"module:Model"`. If
            unset, every row brings its own.
        schema_column (`str`, *optional*, defaults to `"schema"`):
            Dataset column with a row's schema as JSON text.
        reference_column (`str`, *optional*, defaults to `"answer"`):
            Dataset column with the right document as JSON text; null where there is none.
        output_format (`str`, *optional*, defaults to `"json"`):
            `"json"`, `"yaml"`, `"xml"` or `"tool_call"`.
        component_weights (`str` or `dict[str, float]`, *optional*):
            Weights of the components; one that is left out is off. If unset, the reward's own.
        reward_preset (`str`, *optional*):
            `"rl-struct"` is the paper's literal reward, for comparison.
        fence (`str`, *optional*, defaults to `"optional"`):
            Markdown fence around the document: `"optional"`, `"never"` or `"required"`.
        references (`str`, *optional*, defaults to `"value"`):
            `"value"`, or `"allowed"` for lists of allowed values of a tool call's arguments.
        text_match (`str`, *optional*, defaults to `"exact"`):
            How strings are compared with the reference: `"exact"` or `"tokens"`.
        min_length (`int`, *optional*), max_length (`int`, *optional*):
            Bounds in characters for the component length, which is off without them.
        reasoning_end (`str`, *optional*):
            Only what follows this text is judged, e.g. `"</think>"`.
        max_completion_bytes (`int`, *optional*, defaults to `262144`):
            A longer completion is worth nothing and is not parsed.

        > Parameters that control evaluation and warnings

        constrained_eval_share (`float`, *optional*, defaults to `0.0`):
            In evaluation, for this share of each group one more completion is drawn under constrained decoding, scored
            and logged as `eval_constrained/…`. They enter neither loss nor reward.
        plateau_patience (`int`, *optional*, defaults to `20`):
            Warn when a component was 0 in (nearly) all groups for so many generations in a row; 0 never warns.
        fall_patience (`int`, *optional*, defaults to `10`):
            Warn when a component lay below where training began for so many logs in a row; 0 never warns.
    """

    _VALID_DICT_FIELDS = [*TokenCreditGRPOConfig._VALID_DICT_FIELDS, "component_weights"]  # noqa: RUF012 (TRL's own form)

    rollouts: str | None = field(
        default=None,
        metadata={"help": "Where completions come from; unset is TRL's use_vllm and vllm_mode.", "choices": ROLLOUTS},
    )
    schema: str | None = field(
        default=None,
        metadata={"help": "Schema of all rows: a JSON file, JSON text or module:PydanticModel."},
    )
    schema_column: str = field(default="schema", metadata={"help": "Column with a row's schema."})
    reference_column: str = field(default="answer", metadata={"help": "Column with the right document as JSON text."})
    output_format: str = field(
        default="json",
        metadata={"help": "Format of the documents.", "choices": ["json", "yaml", "xml", "tool_call"]},
    )
    component_weights: dict | str | None = field(
        default=None, metadata={"help": "Weights of the reward's components; one that is left out is off."}
    )
    reward_preset: str | None = field(
        default=None, metadata={"help": "'rl-struct' is the paper's literal reward.", "choices": ["rl-struct"]}
    )
    fence: str = field(
        default="optional",
        metadata={"help": "Markdown fence around the document.", "choices": ["optional", "never", "required"]},
    )
    references: str = field(
        default="value",
        metadata={"help": "'value', or 'allowed' for a tool call's allowed values.", "choices": ["value", "allowed"]},
    )
    text_match: str = field(
        default="exact", metadata={"help": "How strings are compared.", "choices": ["exact", "tokens"]}
    )
    min_length: int | None = field(default=None, metadata={"help": "Fewest characters of the document as JSON."})
    max_length: int | None = field(default=None, metadata={"help": "Most characters of the component length."})
    reasoning_end: str | None = field(default=None, metadata={"help": "Only what follows this text is judged."})
    max_completion_bytes: int = field(default=1 << 18, metadata={"help": "A longer completion is worth nothing."})
    constrained_eval_share: float = field(
        default=0.0, metadata={"help": "Share of each evaluation group drawn under constrained decoding as well."}
    )
    plateau_patience: int = field(
        default=20, metadata={"help": "Generations after which a component that stays 0 is warned about; 0: never."}
    )

    fall_patience: int = field(
        default=10,
        metadata={"help": "Logs after which a component that fell is warned about; 0: never."},
    )

    def __post_init__(self) -> None:
        if self.rollouts is not None:
            if self.rollouts not in ROLLOUTS:
                raise ValueError(f"rollouts is {self.rollouts!r}; use one of {', '.join(ROLLOUTS)}.")
            self.use_vllm = self.rollouts != "transformers"
            self.vllm_mode = self.rollouts.removeprefix("vllm-") if self.use_vllm else self.vllm_mode
        if not 0 <= self.constrained_eval_share <= 1:
            raise ValueError(f"constrained_eval_share is {self.constrained_eval_share}; use a share from 0 to 1.")
        super().__post_init__()
        if "field" not in (self.credit or ()):
            return
        if "sequence" in (self.credit or ()):
            raise ValueError("credit names both 'field' and 'sequence', which exclude one another; leave one out.")
        if self.credit_mode == "weight":
            raise ValueError("The credit 'field' is an advantage of its own; leave credit_mode unset.")
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "The credit 'field' normalises each field by itself already; set multi_objective_aggregation to "
                "'sum_then_normalize', or credit to 'sequence'."
            )

    def reward(self) -> StructuredReward:
        """The reward that this configuration describes."""
        return StructuredReward(
            self.schema,
            output_format=self.output_format,  # type: ignore[arg-type]  # checked by the reward
            weights=self.component_weights,  # type: ignore[arg-type]
            preset=self.reward_preset,  # type: ignore[arg-type]
            fence=self.fence,  # type: ignore[arg-type]
            references=self.references,  # type: ignore[arg-type]
            text_match=self.text_match,  # type: ignore[arg-type]
            min_length=self.min_length,
            max_length=self.max_length,
            reasoning_end=self.reasoning_end,
            schema_column=self.schema_column,
            reference_column=self.reference_column,
            limits=Limits(max_bytes=self.max_completion_bytes),
        )


class StructuredGRPOTrainer(TokenCreditGRPOTrainer):
    """`GRPOTrainer` with a structured reward; takes its arguments and `credit_funcs`.

    Args:
        model: see [`~trl.GRPOTrainer`].
        reward_funcs: as there, in your order; `reward_weights` and `reward_processing_classes` lie beside it. Where
            no `StructuredReward` is among them, the one of `args` follows with weight 1; several count each.
        args: a [`StructuredGRPOConfig`].
        train_dataset, eval_dataset: rows with `prompt`, and `schema` and `answer` as the configuration names them
            (`tokalign data gsm8k-json`, `bfcl`, `cooking`). Map-style datasets are checked before training.

    Raises:
        ContractError: a row without a schema, or with one that is invalid, or with a reference that is not JSON; a
            column that is not there.
        TypeError: `args` of another kind.
        ValueError: lists of different lengths, or two structured rewards of one name.

    Attributes:
        structured: the first structured reward, which the constrained baseline follows.
        structured_rewards: all of them.
    """

    args: StructuredGRPOConfig
    _config_class = StructuredGRPOConfig

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: StructuredGRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        *,
        credit_funcs: Any = None,
        **kwargs: Any,
    ):
        args = self._arguments(model, args)
        rewards, weights, classes = _side_by_side(reward_funcs, args, kwargs.pop("reward_processing_classes", None))
        self.structured_rewards = _structured(rewards)
        self.structured = self.structured_rewards[0]
        for name, rows in _named(train_dataset, eval_dataset):
            for reward in self.structured_rewards:
                check_rows(rows, reward, name)
        args = copy(args)  # the caller's may be used again, with weights that lie beside the caller's list
        args.reward_weights = weights
        named = args.credit
        given = list(credit_funcs) if isinstance(credit_funcs, list | tuple) else [credit_funcs]
        if named is None:
            own = any(isinstance(function, FieldCredit) for function in given)
            named = [CREDIT if _has_fields(rewards, args) and not own else "sequence"]
        if "field" in named:
            given = [*_field_credits(rewards, args), *given]
        args.credit = [name for name in named if name not in ("field", "sequence")]  # the rest has no reward to know
        super().__init__(
            model,
            rewards,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            reward_processing_classes=classes,
            credit_funcs=given,
            **kwargs,
        )
        args.credit = named
        if args.constrained_eval_share:
            self._check_constrained(args)
        self._stuck: dict[str, int] = defaultdict(int)
        self._fallen: set[str] = set()  # components that were warned about

    def _coefficient(self, function: Any) -> float:
        # λ of the configuration is the fields' within it (`_field_credits`); what stays is the reward's weight
        return function.coefficient if isinstance(function, FieldCredit) else super()._coefficient(function)

    def _check_constrained(self, args: StructuredGRPOConfig) -> None:
        if self.structured.output_format != "json":
            raise ValueError(
                "constrained_eval_share needs output_format 'json': grammars of a schema are JSON grammars."
            )
        if args.use_transformers_continuous_batching:
            raise ValueError(
                "constrained_eval_share needs use_transformers_continuous_batching false; set one of the two so."
            )
        if self.use_vllm and args.vllm_tensor_parallel_size > 1:
            raise ValueError("constrained_eval_share needs vllm_tensor_parallel_size 1; set one of the two so.")
        if self.use_vllm and not is_byte_encoded(self._tokenizer):
            raise ValueError(
                "vLLM cannot constrain this tokenizer, whose decoder adds text of its own (docs/generation.md); leave "
                "constrained_eval_share at 0 and use `tokalign evaluate structured --constrained true`."
            )

    # ------------------------------------------------------------------------------------------------------ curriculum

    def _set_signature_columns_if_needed(self) -> None:
        """With `remove_unused_columns` the columns stay that the structured rewards read."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns: Any = self._signature_columns  # typed None in transformers
            columns += ["id", *(c for r in self.structured_rewards for c in (r.schema_column, r.reference_column))]

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> torch.Tensor:
        """TRL's rewards; beside them, per component, the share of groups in which no completion has a point."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        mode, group = self._mode_and_group()
        for reward in self.structured_rewards:
            names = reward.active
            rows = reward.last_scores  # of these completions, by TRL's call of the reward
            values = [[float("nan") if row[name] is None else row[name] for name in names] for row in rows]
            gathered = self.accelerator.gather(torch.tensor(values, device=self.accelerator.device))
            for name, column in zip(names, gathered.unbind(-1), strict=True):
                groups = column.view(-1, group)
                groups = groups[~groups.isnan().any(-1)]
                if len(groups) == 0:
                    continue
                share = (groups == 0).all(-1).float().mean().item()
                self._metrics[mode][f"{reward.__name__}/{name}/zero_groups"].append(share)
                if mode == "train":
                    self._warn_if_stuck(reward.__name__, name, share)
        return rewards

    def _warn_if_stuck(self, reward: str, name: str, share: float) -> None:
        key = f"{reward}/{name}"
        self._stuck[key] = self._stuck[key] + 1 if share >= PLATEAU else 0
        if self._stuck[key] == self.args.plateau_patience:
            logger.warning(
                f"The component {key} is 0 for every completion of {share:.0%} of the groups, for "
                f"{self._stuck[key]} generations now, so it teaches nothing: {REMEDIES[name]}."
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self.args.fall_patience and "loss" in logs:
            for reward in self.structured_rewards:
                for name in reward.active:
                    self._warn_if_fallen(f"{reward.__name__}/{name}")

    def _warn_if_fallen(self, key: str) -> None:
        """Warn once where the logs, which a checkpoint keeps, have lain below the first ones for a while."""
        history, patience = self.state.log_history, self.args.fall_patience
        first = list(islice((entry[key] for entry in history if key in entry), START))
        last = list(islice((entry[key] for entry in reversed(history) if key in entry), patience))
        start = sum(first) / max(len(first), 1)
        if key not in self._fallen and len(last) == patience and max(last) < start - FALL:
            self._fallen.add(key)
            logger.warning(
                f"The component {key} began at {start:.2f} and has lain below that for {patience} logs, now at "
                f"{last[0]:.2f}: training takes away what the model could do. Lower `learning_rate`, or raise `beta` "
                f"(now {self.beta:g})."
            )

    # ------------------------------------------------------------------------------------- constrained decoding in eval

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        mode, group = self._mode_and_group()
        if mode == "eval" and self.args.constrained_eval_share > 0:
            self._constrained_baseline(inputs, group)
        return output

    def _constrained_baseline(self, inputs: list[dict[str, Any]], group: int) -> None:
        """Draw a share of each group once more under its schema's grammar, score and log it; nothing else."""
        first = self.accelerator.process_index * len(inputs)
        wanted = max(1, round(self.args.constrained_eval_share * group))
        # every process draws at least one: generation may gather sharded weights, which all must take part in
        chosen = [row for i, row in enumerate(inputs) if (first + i) % group < wanted] or inputs[:1]
        column = self.structured.schema_column
        whole = json.dumps(self.structured.schema.schema if self.structured.schema else True)
        schemas: list[str] = [whole if row.get(column) is None else row[column] for row in chosen]
        prompts = [row["prompt"] for row in chosen]
        self._asked = chosen
        prompt_ids, _, _ = self._tokenize_prompts(prompts)
        completion_ids = self._generate_constrained(prompt_ids, schemas)
        texts: list[Any] = self._tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        if is_conversational({"prompt": prompts[0]}):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        scores = [
            self.structured.score(text, row.get(self.structured.reference_column), schema)
            for text, row, schema in zip(texts, chosen, schemas, strict=True)
        ]
        for name in ("total", *self.structured.active):
            values = [score[name] for score in scores if score[name] is not None]
            sums = torch.tensor([sum(values), len(values)], dtype=torch.float32, device=self.accelerator.device)
            total, count = self.accelerator.gather(sums).view(-1, 2).sum(0).tolist()
            if count:
                label = "reward" if name == "total" else name
                self._metrics["eval"][f"constrained/{label}"].append(total / count)

    def _generate_constrained(self, prompt_ids: list[list[int]], schemas: list[str]) -> list[list[int]]:
        """Completions of prompts, each under its own JSON Schema, by the rollouts' own engine."""
        if not self.use_vllm:
            from tokalign.generation.schema_processor import SchemaLogitsProcessor

            processor = SchemaLogitsProcessor(self._tokenizer, schemas, self.eos_token_ids)
            with _generating_with(self.accelerator.unwrap_model(self.model), logits_processor=[processor]):
                completion_ids = self._generate_single_turn(prompt_ids, None, {}, 1)[0]
            if not processor.used:  # TRL generated by another model object, and freely
                raise RuntimeError("The constrained baseline was not constrained; set constrained_eval_share to 0.")
            return completion_ids
        engine = self.vllm_generation
        if self.args.vllm_mode == "server":
            return self._ask_server(prompt_ids, schemas)
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import StructuredOutputsParams

        options: dict[str, Any] = {
            "temperature": engine.temperature,
            "top_p": engine.top_p,
            "top_k": engine.top_k,
            "max_tokens": engine.max_completion_length,
        }
        each = [SamplingParams(**options, structured_outputs=StructuredOutputsParams(json=s)) for s in schemas]
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in prompt_ids]
        # `engine.generate` takes one grammar for all prompts, so its waking and sleeping are done here
        if engine.enable_sleep_mode:
            engine.sync_weights()
            engine.llm.wake_up(tags=["kv_cache"])
        outputs: Any = engine.llm.generate(prompts, each, use_tqdm=False)
        if engine.enable_sleep_mode:
            engine.llm.sleep(level=2)
            engine._llm_weights_sleeping = True
        return [list(output.outputs[0].token_ids) for output in outputs]

    def _ask_server(self, prompt_ids: list[list[int]], schemas: list[str]) -> list[list[int]]:
        """The main process asks for everybody, one request a schema: the server takes one grammar a request."""
        engine = self.vllm_generation
        everything = gather_object([list(zip(prompt_ids, schemas, strict=True))])
        answers: list[Any] = [None]
        if self.accelerator.is_main_process:
            flat = [item for part in everything for item in part]
            made: list[Any] = [None] * len(flat)
            for schema in dict.fromkeys(schema for _, schema in flat):
                where = [i for i, (_, s) in enumerate(flat) if s == schema]
                reply = engine.vllm_client.generate(
                    prompts=[flat[i][0] for i in where],
                    temperature=engine.temperature,
                    top_p=engine.top_p,
                    top_k=engine.top_k,
                    max_tokens=engine.max_completion_length,
                    generation_kwargs={"structured_outputs": {"json": schema}},
                )
                for i, ids in zip(where, reply["completion_ids"], strict=True):
                    made[i] = ids
            answers = [made]
        broadcast_object_list(answers, from_process=0)
        first = sum(len(part) for part in everything[: self.accelerator.process_index])
        return answers[0][first : first + len(prompt_ids)]


@contextmanager
def _generating_with(model: Any, **options: Any) -> Iterator[None]:
    """`model.generate` with further arguments, which TRL's call of it has no place for."""
    generate: Callable[..., Any] = model.generate
    model.generate = lambda *args, **kwargs: generate(*args, **{**kwargs, **options})
    try:
        yield
    finally:
        del model.generate  # the method of the class again


# ------------------------------------------------------------------------------------------------- lists, side by side


def _side_by_side(
    reward_funcs: Any, args: StructuredGRPOConfig, processing_classes: Any
) -> tuple[list[Any], list[float], list[Any]]:
    """Reward functions in the caller's order, their weights, and their tokenizers (None but for reward models).

    Under `normalize_then_sum` the components of a structured reward stand in its place, each with its own weight times
    the reward's.
    """
    given = [] if reward_funcs is None else list(reward_funcs) if isinstance(reward_funcs, list) else [reward_funcs]
    given = given or [args.reward()]
    weights, classes = (
        [default] * len(given) if values is None else list(values) if isinstance(values, list) else [values]
        for values, default in ((args.reward_weights, 1.0), (processing_classes, None))
    )
    for name, values in (("reward_weights", weights), ("reward_processing_classes", classes)):
        if len(values) != len(given):
            raise ValueError(
                f"`{name}` has {len(values)} entries for {len(given)} reward functions; give one for each, and put "
                "`args.reward()` among `reward_funcs` if the structured reward shall have one."
            )
    if not any(isinstance(function, StructuredReward | ComponentReward) for function in given):
        given, weights, classes = [*given, args.reward()], [*weights, 1.0], [*classes, None]
    rows: list[tuple[Any, float, Any]] = []
    for function, weight, tokenizer in zip(given, weights, classes, strict=True):
        if isinstance(function, StructuredReward) and args.multi_objective_aggregation == "normalize_then_sum":
            parts = function.component_rewards()
            rows += [(part, weight * function.weights[part.component], None) for part in parts]
        else:
            rows.append((function, weight, tokenizer))
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]


def _has_fields(rewards: list[Any], args: StructuredGRPOConfig) -> bool:
    """Whether field credit can be had where nobody asks for it."""
    per_token = args.importance_sampling_level == "token" or args.loss_type in PER_TOKEN_LOSSES
    whole = args.multi_objective_aggregation == "sum_then_normalize"
    structured = [reward for reward in rewards if isinstance(reward, StructuredReward)]
    return per_token and whole and bool(structured) and not any(reward.preset for reward in structured)


def _field_credits(rewards: list[Any], args: StructuredGRPOConfig) -> list[FieldCredit]:
    """The credit of each structured reward's fields.

    The advantage of the other reward functions is normalised without it, and counts once. So each reward's fields count
    as often as its weight goes into theirs.
    """
    weights: list[float] = args.reward_weights  # type: ignore[assignment]  # as many as there are rewards
    fields = [
        (reward, weight)
        for reward, weight in zip(rewards, weights, strict=True)
        if isinstance(reward, StructuredReward)
    ]
    of_fields = sum(abs(weight) for _, weight in fields)
    whole = sum(map(abs, weights)) - of_fields or of_fields or 1.0
    options: dict[str, Any] = {"value_weight": 1.0 if args.credit_coefficient is None else args.credit_coefficient}
    if args.scale_rewards == "none":
        options |= {"scale": "none", "form_scale": "none"}
    return [FieldCredit(reward, weight / whole, **options) for reward, weight in fields]


def _structured(functions: list[Any]) -> list[StructuredReward]:
    """The structured rewards among reward functions, whole or by their components."""
    parts = {id(f.reward): f.reward for f in functions if isinstance(f, ComponentReward)}
    found = [*(f for f in functions if isinstance(f, StructuredReward)), *parts.values()]
    names = [reward.__name__ for reward in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two structured rewards are named {name!r}, and logs tell them apart by it; set `name`.")
    return found


# ----------------------------------------------------------------------------------------------------------- datasets


def _named(train: Any, evaluation: Any) -> list[tuple[str, Dataset]]:
    """Map-style datasets with what to call them; the rows of a stream are checked as they come."""
    several = evaluation if isinstance(evaluation, Mapping) else {"evaluation": evaluation}
    every = [("training", train), *((str(name), rows) for name, rows in several.items())]
    for name, rows in every:
        if isinstance(rows, Dataset | IterableDataset):  # TRL refuses the rest
            first_row(rows, f"The {name} dataset")
    return [(name, rows) for name, rows in every if isinstance(rows, Dataset)]


def check_rows(rows: Dataset, reward: StructuredReward, name: str) -> None:
    """Compile every row's schema and read its reference, a batch at a time.

    Raises:
        ContractError: naming the row, the column and the remedy.
    """
    reward.check_columns(rows.column_names, f"The {name} dataset")
    columns = [c for c in (reward.schema_column, reward.reference_column, "id") if c in rows.column_names]
    if "prompt" not in rows.column_names:
        raise ContractError(f"The {name} dataset has no column `prompt`; build it with `tokalign data`.")
    if not columns:
        return
    number = 0
    batches = rows.select_columns(columns).iter(batch_size=1000)
    for batch in tqdm(batches, total=-(-len(rows) // 1000), desc=f"Checking the {name} dataset", disable=None):
        count = len(next(iter(batch.values())))
        for index in range(count):
            row: dict[str, Any] = {column: batch[column][index] for column in columns}
            _check_row(row, reward, f"Row {number + index}" + (f" (id {row['id']!r})" if "id" in row else ""))
        number += count


def _check_row(row: Mapping[str, Any], reward: StructuredReward, where: str) -> None:
    schema, reference = row.get(reward.schema_column), row.get(reward.reference_column)
    if schema is None and reward.schema is None:
        raise ContractError(f"{where}: `{reward.schema_column}` is missing; give it a JSON Schema, or drop the row.")
    column = reward.schema_column
    try:
        reward.check_row(schema)
        column = reward.reference_column
        reward.check_row(schema, reference)
    except ValueError as error:
        raise ContractError(f"{where}: `{column}`: {str(error).rstrip('.')}.") from None
