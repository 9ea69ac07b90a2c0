"""GRPO whose advantages differ from token to token: credit functions say which tokens a reward is due to.

    A_it = A_i Π_w w_it + Σ_a λ_a c^a_it

A_i is the advantage that TRL's `GRPOTrainer` gives a completion (arXiv 2402.03300). A credit function either *weighs*
it (w, a number per token: 0 for a token that did not matter) or adds an *advantage* of its own (c, times λ). TRL takes
advantages per token and fills them nowhere; sampling, rewards and the loss stay its own. A credit that is the same for
all tokens of a completion leaves the (B,) advantages of `GRPOTrainer`, and with them every bit of its training.
"""

from __future__ import annotations

import asyncio
import atexit
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from trl import GRPOConfig, GRPOTrainer

from tokalign.internals.trl import (
    get_callable_name,
    get_config_model_id,
    shutdown_event_loop_in_daemon,
    start_event_loop_in_daemon,
)
from tokalign.losses import group_advantages, token_advantages
from tokalign.prompts import TEMPLATE_COLUMNS, PromptRendering, refused_row
from tokalign.rewards.judges import load_function
from tokalign.trainers.credits import credit_function
from tokalign.trainers.credits.page import write_credit_page

MODES = ("weight", "advantage")
# Losses whose gradient reaches each token's own log-prob although the importance ratio is the sequence's
PER_TOKEN_LOSSES = ("cispo", "vespo")
_MODELS = ("credit_model", "credit_negative")


@dataclass
class TokenCreditGRPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`TokenCreditGRPOTrainer`].

    This class includes only the parameters that are specific to token credit. For the others, please refer to the
    [`~trl.GRPOConfig`] documentation.

    Parameters:
        credit (`list[str]`, *optional*):
            Credit functions by name: built-in ones, registered signals with an online form, or functions of your own
            as `"module.path:function"` or `"path/to/file.py:function"`. They follow those that the trainer is given.
        credit_mode (`str`, *optional*):
            `"weight"` multiplies a completion's advantage, `"advantage"` adds to it. If unset, each function's own
            `mode`, or `"weight"`.
        credit_coefficient (`float`, *optional*):
            λ of the functions that add. If unset, each function's own `coefficient`, or 1.
        credit_model (`str`, *optional*):
            Model or adapter that credit functions read which compare the policy with another model: contrast's positive
            adapter, the model of the implicit reward, or the teacher.
        credit_negative (`str`, *optional*):
            What `credit_model` is compared with: contrast's negative adapter, or the implicit reward's reference where
            `credit_model` is no adapter.
        credit_page_steps (`int`, *optional*, defaults to `0`):
            Every so many steps, write a page of some groups with what each token was credited with,
            `output_dir/credit/step-<n>.html`; 0 writes none.
    """

    credit: list[str] | None = field(
        default=None,
        metadata={"help": "Credit functions: built-in ones or signals by name, or your own as file.py:function."},
    )
    credit_mode: str | None = field(
        default=None,
        metadata={"help": "How credit enters the advantage; unset is each function's own way.", "choices": MODES},
    )
    credit_coefficient: float | None = field(
        default=None, metadata={"help": "λ of credit that is added; unset is each function's own, or 1."}
    )
    credit_model: str | None = field(
        default=None, metadata={"help": "Model or adapter that a credit function compares the policy with."}
    )
    credit_negative: str | None = field(
        default=None, metadata={"help": "Adapter or model that credit_model is compared with (contrast's negative)."}
    )
    credit_page_steps: int = field(
        default=0, metadata={"help": "Steps after which a page of what tokens were credited with is written; 0: never."}
    )

    def __post_init__(self) -> None:
        self.credit = [self.credit] if isinstance(self.credit, str) else self.credit
        if self.credit_mode not in (None, *MODES):
            raise ValueError(f"credit_mode is {self.credit_mode!r}; use one of {', '.join(MODES)}.")
        if self.credit_coefficient is not None and not math.isfinite(self.credit_coefficient):
            raise ValueError(f"credit_coefficient is {self.credit_coefficient}; use a finite number.")
        if self.credit_page_steps < 0:
            raise ValueError(f"credit_page_steps is {self.credit_page_steps}; use 0 for no page, or a number of steps.")
        super().__post_init__()


class TokenCreditGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` with credit functions; takes its arguments and `credit_funcs`.

    A credit function is called like a reward function, once for the completions of a process:

        f(prompts, completions, completion_ids, rewards, **columns) -> list[list[float] | None]

    and may be `async`. It returns a number for each of a completion's own ids, NaN for a token that it says nothing of,
    None for a completion that keeps the advantage of its sequence. `rewards` are the weighted sums of the reward
    functions (None where none judged); `columns` are what TRL gives reward functions: the dataset's columns,
    `trainer_state`, `log_extra`, `log_metric`, and `environments` where there are some. All functions see the same
    arguments.

    An object may have, beside `__call__`:

        mode ("weight" or "advantage"), coefficient (λ): its defaults, which `credit_mode` and `credit_coefficient` of
            the configuration replace;
        replaces: reward functions that it credits in full. A_i is then made of the others alone, on the completions
            that it speaks of;
        reads: which of `credit_model` and `credit_negative` it reads; unset, both where it is handed the trainer;
        attach(trainer): called once, at the end of the trainer's constructor;
        tokens(trainer, batch) -> `torch.Tensor` of shape `(B, T)`: called instead of `__call__`, with TRL's padded
            generation batch (prompt_ids, prompt_mask, completion_ids, completion_mask, advantages, …), whose
            `advantages` are the A_i that it is combined with;
        prepare(prompts, completions, completion_ids, rewards, **columns): called before `tokens`, for one that needs
            both.

    Args:
        model, reward_funcs, train_dataset, eval_dataset: see [`~trl.GRPOTrainer`], and so the other arguments.
        args: a [`TokenCreditGRPOConfig`].
        credit_funcs: one credit function or several; those that `args.credit` names follow.

    Raises:
        TypeError: `args` of another kind, or a credit function that cannot be called.
        ValueError: two credit functions of one name, one of an unknown mode, or one that replaces a reward function
            which the trainer does not have.

    Attributes:
        credit_funcs: the credit functions.
        credit_func_names: their names in the logs: `credit/<name>/mean`, `/abs_mean`, and `/coverage` (the share of
            the policy's tokens that it speaks of).
    """

    args: TokenCreditGRPOConfig
    _config_class: ClassVar[type[TokenCreditGRPOConfig]] = TokenCreditGRPOConfig
    _asked: list[dict[str, Any]] | None = None  # rows whose prompts become ids
    _next_page = 0  # step at which a page is due

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: TokenCreditGRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        *,
        credit_funcs: Callable[..., Any] | Sequence[Any] | None = None,
        **kwargs: Any,
    ):
        args = self._arguments(model, args)
        super().__init__(model, reward_funcs, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        given = list(credit_funcs) if isinstance(credit_funcs, list | tuple) else [credit_funcs]
        named = [_named(name) for name in args.credit or ()]
        self._credits: dict[str, torch.Tensor] = {}  # (B, T) of the last generation batch, for the page
        self.credit_funcs: list[Any] = [function for function in given + named if function is not None]
        self.credit_func_names = [get_callable_name(function) for function in self.credit_funcs]
        for function in self.credit_funcs:
            if not (callable(function) or hasattr(function, "tokens")):
                raise TypeError(
                    f"`credit_funcs` holds {function!r}, which cannot be called; give it a function, and names to "
                    "`credit` of the configuration."
                )
            if hasattr(function, "attach"):
                function.attach(self)
        self._check_credit()

    @classmethod
    def _arguments(cls, model: Any, args: Any) -> Any:
        """The arguments, by default those of a new run named after the model, as TRL names its own."""
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = cls._config_class(f"{name.split('/')[-1]}-{cls.__name__.removesuffix('Trainer')}")
        if not isinstance(args, cls._config_class):
            raise TypeError(
                f"`args` must be a {cls._config_class.__name__}, got {type(args).__name__}; it has TRL's fields and "
                "those of this trainer."
            )
        return args

    def _check_credit(self) -> None:
        bonuses = [function for function in self.credit_funcs if self._credit_mode(function) == "advantage"]
        kinds = {"credit_coefficient": " whose credit is added to the advantage"}
        kinds |= dict.fromkeys(_MODELS, " that compares models")
        for option, readers in (
            ("credit_mode", self.credit_funcs),
            ("credit_model", [function for function in self.credit_funcs if "credit_model" in _reads(function)]),
            ("credit_negative", [function for function in self.credit_funcs if "credit_negative" in _reads(function)]),
            ("credit_coefficient", bonuses),
        ):
            if getattr(self.args, option) is not None and not readers:
                raise ValueError(
                    f"`{option}` is {getattr(self.args, option)!r}, but no credit function reads it: name one in "
                    "`credit`" + (kinds.get(option, "") if self.credit_funcs else "") + f", or leave `{option}` out."
                )
        for function, name in zip(self.credit_funcs, self.credit_func_names, strict=True):
            if self.credit_func_names.count(name) > 1:
                raise ValueError(
                    f"Two credit functions are named {name!r}, and logs tell them apart by it; rename one."
                )
            if self._credit_mode(function) not in MODES:
                raise ValueError(
                    f"The credit function {name!r} has mode {function.mode!r}; use 'weight' or 'advantage'."
                )
            if missing := [f for f in getattr(function, "replaces", ()) if self._index_of(f) is None]:
                raise ValueError(
                    f"The credit function {name!r} replaces {get_callable_name(missing[0])!r}, which is not among "
                    "`reward_funcs`; give the trainer that very object."
                )

    def _credit_mode(self, function: Any) -> str:
        return self.args.credit_mode or getattr(function, "mode", None) or "weight"

    def _coefficient(self, function: Any) -> float:
        own = getattr(function, "coefficient", None)
        own = 1.0 if own is None else own
        return own if self.args.credit_coefficient is None else self.args.credit_coefficient

    def _index_of(self, reward_function: Any) -> int | None:
        return next((i for i, function in enumerate(self.reward_funcs) if function is reward_function), None)

    def _mode_and_group(self) -> tuple[str, int]:
        """What TRL calls the mode ("train" or "eval"), and the completions of a prompt in it."""
        training = self.model is not None and self.model.training
        mode, group = ("train", self.num_generations) if training else ("eval", self.num_generations_eval)
        return mode, group or 1

    # --------------------------------------------------------------------------------------------------------- prompts

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """TRL's ids; messages with `tools` or `chat_template_kwargs`, columns that TRL does not read here, are rendered
        by the rule that samples, scores and evaluates them."""
        asked = self._asked or [{}] * len(prompts)
        rows = [{**row, "prompt": prompt} for row, prompt in zip(asked, prompts, strict=True)]
        try:
            own = any(row.get(column) is not None for row in rows for column in TEMPLATE_COLUMNS)
            if self.tools or not own or isinstance(prompts[0], str):
                return super()._tokenize_prompts(prompts)
        except TemplateError as error:
            raise refused_row(rows, self._tokenizer, error) from error
        variables: Any = self.chat_template_kwargs  # typed as the text that a command line gives
        rendering = PromptRendering(chat_template_kwargs=variables)
        return [rendering.ids(row, self._tokenizer) for row in rows], None, {}

    # ------------------------------------------------------------------------------------------------------- functions

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> torch.Tensor:
        """TRL's rewards; then the credit functions are asked, so that what they log belongs to this batch."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._written = completion_ids_list
        if self.credit_funcs:
            self._rewards_per_func = rewards
            self._said = self._ask(inputs, prompts, completions, completion_ids_list)
        return rewards

    def _ask(self, inputs: list[dict[str, Any]], prompts: Any, completions: Any, ids: list[list[int]]) -> list[Any]:
        """What each function of lists says of this process's completions, checked; None for one of padded batches."""
        columns = [key for key in inputs[0] if key not in ("prompt", "completion", "completion_ids")]
        arguments: dict[str, Any] = {key: [row[key] for row in inputs] for key in columns}
        arguments |= {"trainer_state": self.state, "log_extra": self._log_completion_extra}
        arguments |= {"log_metric": self._log_metric}
        if self.environments is not None:
            arguments["environments"] = self.environments
        totals = (self._rewards_per_func * self.reward_weights.to(self._rewards_per_func.device)).nansum(dim=1)
        totals = totals.masked_fill(self._rewards_per_func.isnan().all(dim=1), torch.nan)[self._own(len(prompts))]
        arguments |= {"prompts": prompts, "completions": completions, "completion_ids": ids}
        arguments["rewards"] = [None if total != total else total for total in totals.tolist()]
        said = [None if hasattr(f, "tokens") else f(**arguments) for f in self.credit_funcs]
        for function in self.credit_funcs:
            if hasattr(function, "prepare"):
                function.prepare(**arguments)
        waiting = {i: value for i, value in enumerate(said) if inspect.isawaitable(value)}
        for i, value in zip(waiting, self._wait_for(list(waiting.values())), strict=True):
            said[i] = value
        for function, name, rows in zip(self.credit_funcs, self.credit_func_names, said, strict=True):
            if not hasattr(function, "tokens"):
                _check_said(name, rows, ids)
        return said

    def _wait_for(self, coroutines: list[Awaitable[Any]]) -> list[Any]:
        """Results of async functions, on the loop that TRL keeps for its own (a client belongs to one loop)."""
        if not coroutines:
            return []
        if not hasattr(self, "async_loop"):  # TRL starts it where a reward function or a tool is async
            self.async_loop_thread, self.async_loop, ready = start_event_loop_in_daemon(name="TokenCredit-AsyncLoop")
            ready.wait()
            atexit.register(shutdown_event_loop_in_daemon, self.async_loop_thread, self.async_loop)

        async def every() -> list[Any]:
            return await asyncio.gather(*coroutines)

        return asyncio.run_coroutine_threadsafe(every(), self.async_loop).result()

    def _own(self, rows: int) -> slice:
        """This process's rows of what is gathered."""
        first = self.accelerator.process_index * rows
        return slice(first, first + rows)

    # ------------------------------------------------------------------------------------------------------ advantages

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._asked = inputs  # TRL hands on the prompts alone
        output = super()._generate_and_score_completions(inputs)
        if self.credit_funcs:
            output["advantages"] = self._with_credit(output)
        steps = self.args.credit_page_steps
        if steps and self._mode_and_group()[0] == "train" and self.state.global_step >= self._next_page:
            self._next_page = self.state.global_step + steps
            write_credit_page(self, inputs, output, self._written, self._credits)
        return output

    def _with_credit(self, batch: dict[str, Any]) -> torch.Tensor:
        """A_it of a generation batch, (B, T); the sequences' own (B,) where no completion's tokens differ."""
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)
        written = mask.bool()
        weights, bonuses, sums = [], [], []
        # First those that replace reward functions: the others are told the A_i that they are combined with.
        replacing = {i for i, function in enumerate(self.credit_funcs) if getattr(function, "replaces", ())}
        made = {i: self._tokens(i, batch) for i in replacing}
        sequence = self._sequence_advantages(batch["advantages"], made, written)
        batch = {**batch, "advantages": sequence}
        credits = [made[i] if i in made else self._tokens(i, batch) for i in range(len(self.credit_funcs))]
        for function, name, values in zip(self.credit_funcs, self.credit_func_names, credits, strict=True):
            self._credits[name] = values.nan_to_num(1.0 if self._credit_mode(function) == "weight" else 0.0)
            if self._credit_mode(function) == "weight":
                weights.append(values)
            else:
                bonuses.append((self._coefficient(function), values))
            said = values[written & ~values.isnan()]
            sums += [said.sum(), said.abs().sum(), torch.tensor(float(len(said)), device=said.device)]
        advantages = token_advantages(sequence, mask, weights, bonuses)

        # The number of a completion whose tokens all have it. One whose tokens are all masked keeps TRL's.
        first = advantages.gather(1, mask.int().argmax(dim=1, keepdim=True))
        differ = ((advantages != first) & written).any()
        flat = torch.where(written.any(dim=1), first.squeeze(1), sequence)

        # All processes have advantages of one shape, or TRL's metrics would be means over rows and tokens mixed
        sums += [written.sum().float(), differ.float()]
        *sums, tokens, differ_anywhere = self.accelerator.reduce(torch.stack(sums), reduction="sum").tolist()
        metrics = self._metrics[self._mode_and_group()[0]]
        for i, name in enumerate(self.credit_func_names):
            total, absolute, count = sums[3 * i : 3 * i + 3]
            metrics[f"credit/{name}/coverage"].append(count / max(tokens, 1))
            if count:
                metrics[f"credit/{name}/mean"].append(total / count)
                metrics[f"credit/{name}/abs_mean"].append(absolute / count)
        if not differ_anywhere:
            return flat
        if self.importance_sampling_level == "sequence" and self.loss_type not in PER_TOKEN_LOSSES:
            raise ValueError(
                f"importance_sampling_level 'sequence' gives loss_type {self.loss_type!r} one ratio per completion, "
                "whose gradient would average the tokens' advantages away; set importance_sampling_level to 'token', "
                f"or loss_type to {' or '.join(PER_TOKEN_LOSSES)}."
            )
        return advantages

    def _tokens(self, index: int, batch: dict[str, Any]) -> torch.Tensor:
        """A function's credit of a padded batch, (B, T); NaN where it says nothing."""
        ids, function, rows = batch["completion_ids"], self.credit_funcs[index], self._said[index]
        if rows is None:
            values = function.tokens(self, batch)
            if values.shape != ids.shape:
                raise ValueError(
                    f"The credit function {self.credit_func_names[index]!r} returned shape {tuple(values.shape)} for "
                    f"completions of shape {tuple(ids.shape)}; return one number for each position."
                )
            values = values.detach().to(ids.device, torch.float32)
        else:
            values = torch.full(ids.shape, torch.nan)
            for row, said in zip(values, rows, strict=True):
                if said is not None:
                    row[: len(said)] = _numbers(said, self.credit_func_names[index])
            values = values.to(ids.device)
        if values.isinf().any():
            row = int(values.isinf().any(dim=1).nonzero()[0])
            raise ValueError(
                f"The credit function {self.credit_func_names[index]!r} returned an infinite number for completion "
                f"{row}; return finite ones, NaN for a token that it says nothing of."
            )
        return values

    def _sequence_advantages(
        self, advantages: torch.Tensor, replacing: Mapping[int, torch.Tensor], written: torch.Tensor
    ) -> torch.Tensor:
        """A_i, (B,): TRL's, but without the reward functions that credit replaces on a completion.

        `replacing` holds what the credit functions that replace some say, by their indices.
        """
        replaced: list[set[int]] = [set() for _ in advantages]
        for index, values in replacing.items():
            indices = {self._index_of(f) for f in self.credit_funcs[index].replaces}
            for row in (written & ~values.isnan()).any(dim=1).nonzero().flatten().tolist():
                replaced[row] |= indices  # type: ignore[arg-type]  # they were all found at the start
        result = advantages.clone()
        for away in {frozenset(row) for row in replaced if row}:
            kept = [i for i in range(len(self.reward_funcs)) if i not in away]
            others = group_advantages(
                self._rewards_per_func[:, kept],
                self.reward_weights.to(advantages.device)[kept],
                group_size=self._mode_and_group()[1],
                scale_rewards=self.scale_rewards,
                aggregation=self.multi_objective_aggregation,
            )[self._own(len(advantages))]
            rows = torch.tensor([row == away for row in replaced], device=advantages.device)
            result = torch.where(rows, others, result)
        return result


def _reads(function: Any) -> Sequence[str]:
    """Options that name models which a credit function reads, or may read where it does not say."""
    sees_trainer = hasattr(function, "attach") or hasattr(function, "tokens")
    return getattr(function, "reads", _MODELS if sees_trainer else ())


def _named(name: str) -> Any:
    """A credit function by its place, or by its name in the table and among the signals. A class is called."""
    if ":" not in name:
        return credit_function(name)
    found, _ = load_function(name, "--credit")
    return found() if inspect.isclass(found) else found


def _check_said(name: str, rows: Any, completion_ids: list[list[int]]) -> None:
    """Whether there is a row for each completion and a number for each of its ids."""
    if not isinstance(rows, Sized) or len(rows) != len(completion_ids):
        what = f"{len(rows)} rows" if isinstance(rows, Sized) else repr(rows)
        raise ValueError(
            f"The credit function {name!r} returned {what} for {len(completion_ids)} completions; return a list for "
            "each, or None for a completion that keeps its sequence's advantage."
        )
    said: Any = rows  # anything of a length, as far as a type checker knows
    for number, (row, ids) in enumerate(zip(said, completion_ids, strict=True)):
        if row is not None and (not isinstance(row, Sized) or len(row) != len(ids)):
            what = f"{len(row)} numbers" if isinstance(row, Sized) else repr(row)
            raise ValueError(
                f"The credit function {name!r} returned {what} for the {len(ids)} ids of completion "
                f"{number}; return one for each of its `completion_ids`."
            )


def _numbers(said: Any, name: str) -> torch.Tensor:
    """What a function said of a completion, (T,)."""
    try:
        return torch.as_tensor(said, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The credit function {name!r} returned what is no number ({error}); return numbers, NaN for a token that "
            "it says nothing of."
        ) from None
