"""How a prompt becomes token ids: one rule for sampling, scoring, training, evaluation and serving, so that a model is
tested on the prompts it was trained on; and prompt templates as data, a JSON object that ships with the package or is a
user's.

A row may say what its chat template is given, in the columns that TRL reads: `tools` (a list, or JSON text) and
`chat_template_kwargs` (an object, such as `{"enable_thinking": false}`). `--chat_template_kwargs` says the same for all
rows; a row's own value comes before it.

A stage, and a folder that holds a trained model, records the rendering in `manifest.json` under `prompts`: the format,
the chat template's hash, its arguments, and the date if the template asks for one (`strftime_now`). A job that is
resumed renders by its first start's date, and whoever reads the stage, or evaluates the model, renders as it did.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cache, lru_cache, partial
from pathlib import Path
from string import ascii_letters
from typing import Any, Literal

from accelerate.utils import broadcast_object_list
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from tokalign.stage.errors import ContractError
from tokalign.stage.manifest import MANIFEST, read_manifest
from tokalign.stage.processes import process_state

logger = logging.getLogger(__name__)

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # of a row, as TRL reads them
RECORD = "prompts"  # key of a manifest that says how its prompts were rendered
_RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
_OF_ROWS = ("chat_template", "documents")  # which TRL hands on from a row
UNRENDERED = (TemplateError, TypeError, json.JSONDecodeError)  # what rows raise that the chat template cannot take
_CLOCK = "strftime_now"  # what templates call for the date


@dataclass(kw_only=True)
class TemplateArguments:
    """What the chat template is given, for every row that does not say it itself."""

    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "JSON object of variables for the chat template, such as '{\"enable_thinking\": false}'; unset: "
            "those that rows or model were made with."
        },
    )

    def __post_init__(self) -> None:
        self.chat_template_kwargs = template_variables(self.chat_template_kwargs)


@dataclass(kw_only=True)
class PromptArguments(TemplateArguments):
    """How prompts become ids."""

    prompt_format: Literal["chat", "raw"] | None = field(
        default=None,
        metadata={
            "help": "`chat` renders a prompt by the chat template, `raw` encodes a string as it is; unset is what the "
            "model was trained on, else `chat`."
        },
    )


def template_variables(given: Any) -> dict[str, Any] | None:
    """`chat_template_kwargs` as an object; None if it is not given.

    Raises:
        ContractError: not an object, or it sets what the call of the template sets.
    """
    if given is None:
        return None
    try:
        variables = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise ContractError(f"--chat_template_kwargs is not JSON ({error}); write an object.") from None
    if not isinstance(variables, Mapping):
        raise ContractError(f"--chat_template_kwargs is {given!r}; write a JSON object of the template's variables.")
    if taken := reserved(variables):
        raise ContractError(f"--chat_template_kwargs cannot set `{taken}`; give variables of the template.")
    return dict(variables)


def reserved(variables: Iterable[str]) -> str | None:
    """The first name that is an argument of `apply_chat_template` and not of the template; None if there is none."""
    return next((name for name in variables if name in _RESERVED), None)


# ----------------------------------------------------------------------------------------------------------- one prompt


def render_prompt(
    prompt: str | list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: str = "chat",
    *,
    tools: list[Any] | str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    date: str | None = None,
    add_generation_prompt: bool = True,
    name: str | None = None,
) -> list[int]:
    """Token ids of a prompt, by the chat template those of TRL's trainers.

    Args:
        prompt: a string or messages.
        prompt_format: "chat" renders messages, or a string as the user's message, by the chat template; "raw" encodes
            a string as it is.
        tools: what the template lists as tools, or their JSON text.
        chat_template_kwargs: variables of the template.
        date: what a template that asks for the date is told (ISO 8601); None is when this process first rendered.
        add_generation_prompt: whether the answer's beginning follows, as in a prompt.
        name: what to call the row in errors.

    Raises:
        ContractError: messages with "raw", a tokenizer that has no chat template, or one that refuses the messages.
    """
    if prompt_format == "raw" and isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    row = "" if name is None else f"Row {name}: "
    if prompt_format != "chat":
        raise ContractError(f"{row}`prompt` holds messages, which `{prompt_format}` cannot render: use `chat`.")
    if tokenizer.chat_template is None:
        raise ContractError("This tokenizer has no chat template: use prompt_format `raw`, or an instruct model.")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not messages:
        raise ContractError(f"{row}`prompt` has no message; write one, or drop the row.")
    variables: dict[str, Any] = {"tools": _tools(tools, row), **_variables(chat_template_kwargs, row)}
    if asks_for_the_date(tokenizer) and "chat_template" not in variables:
        variables["chat_template"] = dated(tokenizer.get_chat_template(None, variables["tools"]), date or first_time())

    def encode(messages: list[dict[str, Any]]) -> Any:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, return_dict=True, **variables
        )

    try:
        return list(encode(messages)["input_ids"])
    except (TemplateError, TypeError) as error:  # TypeError: the template joins what is not text
        raise ContractError(f"{row}{_refusal(messages, encode, error)}") from error


def _tools(tools: list[Any] | str | None, row: str) -> list[Any] | None:
    if not isinstance(tools, str):
        return tools
    try:
        return json.loads(tools)
    except ValueError as error:
        raise ContractError(f"{row}`tools` is not JSON ({error}); write a list of OpenAI's form.") from None


def _variables(given: Any, row: str) -> Mapping[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise ContractError(f"{row}`chat_template_kwargs` is {given!r}; write an object of the template's variables.")
    said = [name for name, value in (given or {}).items() if value is not None]  # Arrow fills up with None
    if taken := reserved([name for name in said if name not in _OF_ROWS]):
        raise ContractError(f"{row}`chat_template_kwargs` cannot set `{taken}`; leave it out of the row.")
    return given or {}


def merged(own: Mapping[str, Any] | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """A row's variables, and the given ones where it has none: Arrow fills what other rows alone have with None."""
    row = dict(own or {})
    return row | {name: value for name, value in given.items() if row.get(name) is None}


def _refusal(messages: list[dict[str, Any]], encode: Any, error: Exception) -> str:
    """What is wrong with messages that the template refuses: its words, and whether a system message is to blame."""
    said = " ".join(str(error).split())[:200]
    others = [message for message in messages if message.get("role") != "system"]
    if 0 < len(others) < len(messages):
        try:
            encode(others)
        except (TemplateError, TypeError):
            pass
        else:
            return (
                f"the chat template has no place for a system message ({said}); put its text before the user's first "
                "message in `prompt`, or use a model whose template has that role."
            )
    roles = ", ".join(str(message.get("role")) for message in messages[:8])
    return f"the chat template refuses these messages ({said}; roles {roles}); change `prompt`, or drop the row."


# ------------------------------------------------------------------------------------------------------ how a stage did


@dataclass(frozen=True)
class PromptRendering:
    """How the prompts of a stage become ids.

    Attributes:
        format: "chat" or "raw", as in `render_prompt`.
        chat_template_kwargs: variables of the template, for rows without their own.
        date: what the template is told, if it asks for the date (ISO 8601); None is as in `render_prompt`.
        template: hash of the template that rendered them, where it is not the tokenizer's.
    """

    format: str = "chat"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None
    template: str | None = None

    def ids(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[int]:
        """Ids of a row's `prompt`, with its own `tools` and `chat_template_kwargs`; `options` of `render_prompt`."""
        given: Any = {"name": repr(row.get("id")), **self.options(row), **options}
        return render_prompt(row["prompt"], tokenizer, self.format, **given)

    def options(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What `render_prompt` is told of a row beside its prompt."""
        own = _variables(row.get("chat_template_kwargs"), f"Row {row.get('id')!r}: ")
        variables = merged(own, self.chat_template_kwargs)
        return {"tools": row.get("tools"), "chat_template_kwargs": variables, "date": self.date}

    def record(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """What a manifest says of it under `prompts`."""
        template = None if self.format == "raw" else self.template or template_hash(tokenizer)
        return {**asdict(self), "chat_template_kwargs": dict(self.chat_template_kwargs), "template": template}


AS_CHAT = PromptRendering()


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Identity of a tokenizer's chat template, None if it has none."""
    template = tokenizer.chat_template
    return None if template is None else hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()


def recorded_beside(*models: str | Path | None) -> dict[str, Any] | None:
    """How the prompts were rendered that a model was trained on: the record of the first of these folders with one.

    Args:
        models: the adapter before its base: the last training counts.
    """
    for model in models:
        if model and (Path(model) / MANIFEST).is_file() and (record := read_manifest(model).get(RECORD)) is not None:
            return record
    return None


def rendering_of(
    given: TemplateArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    recorded: Mapping[str, Any] | None = None,
    of: str = "the model",
    must_agree: bool = False,
    any_template: bool = False,
    folder: str | Path | None = None,
    key: str = RECORD,
    prompt_format: str = "chat",
) -> PromptRendering:
    """The rendering that a job uses: what its arguments say, and where they are silent what was recorded.

    Args:
        recorded: the record of the stage that is read, or of the model that is asked; None if there is none.
        of: whose record it is, for the sentence about a difference.
        must_agree: ids of the recorded rendering are used beside new ones, so a difference is an error; else a warning.
        any_template: the ids may be another tokenizer's, so another template is a warning all the same.
        folder: of the stage that is written: a resumed job takes the date of its first start from there.
        key: of its manifest, where the rendering is recorded.
        prompt_format: where neither arguments nor record say it.

    Raises:
        ContractError: `must_agree`, and the rendering is not the recorded one.
    """
    record = recorded or {}
    asked = given.chat_template_kwargs
    variables: Any = asked if asked is not None else record.get("chat_template_kwargs") or {}
    form = getattr(given, "prompt_format", None) or record.get("format") or prompt_format
    rendering = PromptRendering(form, variables, _date(tokenizer, record, folder, key))
    if recorded is not None:
        here = rendering.record(tokenizer)
        different = [key for key in ("format", "template", "chat_template_kwargs") if here[key] != record.get(key)]
        if different and form == "raw" == record.get("format"):
            different = []  # a template that nothing is rendered by
        if different:
            was, is_now = ({key: _short(values.get(key)) for key in different} for values in (record, here))
            sentence = f"Prompts are rendered otherwise than those of {of} ({_listed(is_now)}, there {_listed(was)})"
            if must_agree and not (any_template and different == ["template"]):
                raise ContractError(
                    f"{sentence}; leave out --chat_template_kwargs, use that model's tokenizer, or set "
                    "`allow_other_tokenizer` if another template is meant."
                )
            logger.warning("%s; leave out --prompt_format and --chat_template_kwargs to follow it.", sentence)
    return rendering


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


# ------------------------------------------------------------------------------------------------ rows that TRL renders


def give_variables(rows: Any, variables: Mapping[str, Any] | None) -> Any:
    """A dataset whose rows have `chat_template_kwargs`, where TRL looks for them; a row's own come before the given.

    Where some rows alone have the column, the others hold None, at which TRL stops: those get an empty object.
    """
    if not variables and "chat_template_kwargs" not in (rows.column_names or next(iter(rows), {})):
        return rows

    def filled(row: Mapping[str, Any], number: int) -> dict[str, Any]:
        own = _variables(row.get("chat_template_kwargs"), f"Row {row.get('id', number)!r}: ")
        return {"chat_template_kwargs": merged(own, variables or {})}

    return rows.map(filled, with_indices=True)


def refused_row(rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, error: Exception) -> Exception:
    """The sentence about the first row that TRL or the template refuses, where TRL names none; `error` if none is."""
    for number, row in enumerate(rows):
        name = f"Row {row.get('id', number)!r}"
        if (column := next((c for c in ("prompt", "chosen", "rejected") if row.get(c, "") is None), None)) is not None:
            return ContractError(f"{name}: `{column}` is missing; write it, or drop the row.")
        if isinstance(row.get("prompt"), str) and isinstance(row.get("chosen"), list):
            return ContractError(
                f"{name}: `prompt` is text beside messages; leave it out if both answers begin with it."
            )
        start = row["prompt"] if isinstance(row.get("prompt"), list) else []
        answers = [row[c] for c in ("chosen", "rejected", "completion", "messages") if isinstance(row.get(c), list)]
        for messages in [start, *(start + answer for answer in answers)]:
            try:
                if messages:
                    named = {**row, "id": row.get("id", number), "prompt": messages}
                    AS_CHAT.ids(named, tokenizer, add_generation_prompt=messages is start)
            except ContractError as refusal:
                return refusal
    return error


# ------------------------------------------------------------------------------------------------------------- the date


def asks_for_the_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template's text depends on when it is rendered."""
    return _CLOCK in str(tokenizer.chat_template)


def _date(
    tokenizer: PreTrainedTokenizerBase, record: Mapping[str, Any], folder: str | Path | None, key: str
) -> str | None:
    """The date of a job: of its first start, of what it follows, or now; the main process's, for all of them."""
    if not asks_for_the_date(tokenizer):
        return None
    state = process_state()
    date: list[Any] = [None]
    if state.is_main_process:
        before = {} if folder is None or not (Path(folder) / MANIFEST).is_file() else read_manifest(folder)
        date = [(before.get(key) or {}).get("date") or record.get("date") or now()]
    return (broadcast_object_list(date) if state.num_processes > 1 else date)[0]


def now() -> str:
    """This moment, as it is recorded."""
    return datetime.now().isoformat(timespec="seconds")


@cache
def first_time() -> str:
    """The moment at which this process first asked."""
    return now()


def tell_the_date(tokenizer: PreTrainedTokenizerBase, date: str) -> None:
    """Let all that renders by this tokenizer, TRL's trainers too, be told one date; what is saved stays as it is.

    The date becomes part of the tokenizer's identity to `datasets`, whose cache then keeps the rows of two days apart.
    """
    tokenizer.get_chat_template = partial(_template_at, tokenizer, date)  # type: ignore[method-assign]


def _template_at(tokenizer: PreTrainedTokenizerBase, date: str, *args: Any, **kwargs: Any) -> str:
    return dated(type(tokenizer).get_chat_template(tokenizer, *args, **kwargs), date)


# A variable of the template cannot be a function, since transformers hands on nothing but data. A macro at its head
# can, and it hides the global of the same name. The line break ends the block and is swallowed (`trim_blocks`), so that
# the template behind it starts a line, as it does alone.
_MACRO = (
    "{%- macro " + _CLOCK + "(format) -%}"
    r'{%- for part in format.replace("%%", "\0").split("%") -%}'
    "{%- set width = 0 if loop.first else 2 if part[0] == '-' else 1 -%}"
    r'{{- VALUES[part[:width]] -}}{{- part[width:].replace("\0", "%") -}}'
    "{%- endfor -%}"
    "{%- endmacro %}\n"
)


@lru_cache(maxsize=16)
def dated(template: str, date: str) -> str:
    """A chat template that is told `date` (ISO 8601) wherever it asks for the time."""
    if _CLOCK not in template or template.startswith(_MACRO[:30]):
        return template
    moment = datetime.fromisoformat(date)
    directives = [flag + letter for letter in ascii_letters for flag in ("", "-")]
    values = {directive: moment.strftime(f"%{directive}") for directive in directives}
    return _MACRO.replace("VALUES", json.dumps({"": "", **values})) + template


# ---------------------------------------------------------------------------------------------------- templates as data


def read_template(name_or_path: str | Path, built_in: Path, *, absent: str, parts: str) -> tuple[str, dict[str, Any]]:
    """Name and content of a template; what has to be in it is the caller's to check.

    Args:
        name_or_path: the stem of a file in `built_in`, or a path.
        built_in: folder of the package's own.
        absent: how the sentence begins if there is none, e.g. "There is no judge template".
        parts: what a file must hold, for the remedy, e.g. "`better` and `worse`".

    Raises:
        ContractError: neither a name nor a readable file, or not a JSON object.
    """
    names = sorted(file.stem for file in built_in.glob("*.json"))
    file = built_in / f"{name_or_path}.json" if name_or_path in names else Path(name_or_path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        one = "one of " if len(names) > 1 else ""
        raise ContractError(
            f"{absent} {str(name_or_path)!r} ({error.strerror}); use {one}{', '.join(names)}, or the path of a JSON "
            "file."
        ) from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deep
        raise ContractError(f"{file} is not JSON ({error}); write an object with {parts}.") from None
    if not isinstance(content, dict):
        raise ContractError(f"{file} is not a JSON object; write an object with {parts}.")
    return file.stem, content
