"""A reward for answers that must have a structure: graded, bounded in time on hostile text, and hard to game.

    R = Σ_i w_i R_i      over structure, format, validity, schema, correctness, length, each in [0, 1]

after RL-Struct (arXiv 2512.00319), whose literal reward is `preset="rl-struct"`
(`tokalign.rewards.structured.rl_struct`). A completion is read once, strictly
(`tokalign.rewards.structured.documents.reading`), and every component is a small function of that one reading. With k
the grade of keys and types and f the same with bounds (`tokalign.rewards.structured.grading`):

| the completion is | structure | correctness | others |
|---|---|---|---|
| an answer: one whole document with a part that the schema asks for, or right | FLOOR + (1 − FLOOR) k | a | below |
| one with c characters around it, or broken off | 0.9 FLOOR k (½ + ½ / (1 + c / 100)) | AROUND a, BROKEN a | 0 |
| without a part that is asked for and of the right type, or right | 0.9 FLOOR k | a | 0 |
| anything else: `{}`, a scalar, a JSON string, prose, repeated keys, NaN, too deep, too long | 0 | 0 | 0 |

    a = share of the reference that the document says (`tokalign.rewards.structured.alignment`)
    validity 1;  format 1 if the fence is as asked;  schema ½ f + ½ [valid and no invented key]
    length 1 if valid and within the bounds

Correctness has three quarters of all weight: form alone (1.0 of 4.0) is worth less than a document with half of its
values right and one fault of form, and each value put right pays, whatever else is wrong. Below alternatives (`anyOf`,
`oneOf`) a value put right may change the alternative that a document is graded by, and with it its form.

**Without a reference the reward sees form alone.** Placeholders that fit the schema then have full marks, and a policy
will find them: give references, or other rewards beside this one.

A *fault* is a missing key, an invented key, a value of a wrong type, or text around the document. While the component
structure is on, a fault lowers each score that is above 0. Whichever components are on, a fault raises none of them, as
long as the reference fits the schema. Where the schema has alternatives, a completion is judged by the one that it fits
best, so a change is a fault only if it is one under that alternative, both before and after the change. An empty list
is right where the schema asks for no items; `minItems` or a reference makes it cost. An empty document is an answer
where the reference is empty, or where the schema allows no other. A valid document without invented keys has full marks
of form, whatever words the schema uses, and one that equals the reference has all.

Deviations from the paper: structure is judged on parsed keys and types instead of substrings, a fence is no reason to
be invalid, correctness compares typed values instead of words and weighs most, the length term is a bonus instead of
a malus.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal

import pydantic_core

from tokalign.rewards.structured import rl_struct
from tokalign.rewards.structured.alignment import Aligner, Alignment, CallAligner, Leaf, Target, align, target_of
from tokalign.rewards.structured.calls import AllowedAligner, is_allowed_reference
from tokalign.rewards.structured.content import TextMatch, equal
from tokalign.rewards.structured.credit import Credit, credit_of, is_all_right, whole_credit
from tokalign.rewards.structured.documents.document import FORMATS, MISSING, Document, Format, Limits, Source
from tokalign.rewards.structured.documents.json import check_limits, decode_json
from tokalign.rewards.structured.documents.reading import answer_of, read_document, text_of
from tokalign.rewards.structured.grading import Grade, TooManyValues
from tokalign.rewards.structured.schemas import NO_SCHEMA, CompiledSchema, SchemaError, compile_schema, compile_text
from tokalign.stage.errors import ContractError

COMPONENTS = ("structure", "format", "validity", "schema", "correctness", "length")
WEIGHTS = {"structure": 0.4, "format": 0.1, "validity": 0.2, "schema": 0.3, "correctness": 3.0, "length": 0.1}
NAME, SCHEMA_COLUMN, REFERENCE_COLUMN = "structured", "schema", "answer"
FLOOR = 0.1  # structure of the least answer; what is not an answer stays below it
AROUND, BROKEN = 0.9, 0.5  # correctness of what has text around it, and of what breaks off, beside that of the whole
_KEPT = 1024  # parsed references
# how an object may become JSON: Pydantic's own way, by alias, and by the two options that a model's configuration has
_KINDS: tuple[dict[str, Any], ...] = (
    {"by_alias": False, "inf_nan_mode": "strings"},
    {"by_alias": True},
    {"by_alias": False, "timedelta_mode": "float", "bytes_mode": "base64"},
)
_PERFECT = Grade(1.0, 1.0, True)
_NOTHING = Grade(0.0, 0.0, False)


class StructuredReward:
    """Scores structured completions; an instance is a reward function for TRL's `GRPOTrainer`.

    ```python
    reward = StructuredReward(schema=Recipe)  # a Pydantic model, a JSON Schema, or the path of one
    reward.score('{"name": "soup", "servings": 4}', reference={"name": "soup", "servings": 4})["total"]
    trainer = GRPOTrainer(model, reward_funcs=reward, train_dataset=problems)  # columns `schema` and `answer` are read
    ```

    Args:
        schema: JSON Schema as an object, JSON text, the path of a JSON file, a Pydantic model class or its name as
            "module:Model". None takes each row's own from the column `schema_column`; a row's schema wins over it.
        output_format: "json", "yaml", "xml" or "tool_call".
        weights: of components, by name; a component that is left out has weight 0 and is off. None is `WEIGHTS`.
        preset: "rl-struct" is the paper's literal reward, with its weights; it is easily gamed.
        fence: whether the document stands in a Markdown fence: "optional" (either way is fine), "never", "required".
        references: "value" compares with the reference as a document; "allowed" takes lists of allowed values for
            each argument of a tool call, or of several in any order (`tokalign.rewards.structured.calls`).
        text_match: "exact", or "tokens" to compare strings by the F1 over their words.
        min_length, max_length: bounds in characters, the lower one of the document written as JSON on one line, the
            upper one of the text as it is; the component length is off without them.
        reasoning_end: only what follows the last occurrence of this text is judged, e.g. "</think>"; of a message whose
            reasoning a chat parser has taken out, its content.
        schema_column, reference_column: dataset columns. One of another name than the default must be there.
        limits: most bytes, depth and values of a completion.
        name: name of the reward and prefix of its metrics, and of its columns in the table of completions if it is
            another than the default: so several rewards lie beside one another.

    Attributes:
        last_scores: what the last `score_batch` gave.

    Raises:
        SchemaError: an invalid schema, with the place in it.
        ValueError: an unknown component, option or bound.
    """

    def __init__(
        self,
        schema: Any = None,
        *,
        output_format: Format = "json",
        weights: Mapping[str, float] | None = None,
        preset: Literal["rl-struct"] | None = None,
        fence: Literal["optional", "never", "required"] = "optional",
        references: Literal["value", "allowed"] = "value",
        text_match: TextMatch = "exact",
        min_length: int | None = None,
        max_length: int | None = None,
        reasoning_end: str | None = None,
        schema_column: str = SCHEMA_COLUMN,
        reference_column: str = REFERENCE_COLUMN,
        limits: Limits | None = None,
        name: str = NAME,
    ):
        for option, value, known in (
            ("output_format", output_format, FORMATS),
            ("preset", preset, (None, "rl-struct")),
            ("fence", fence, ("optional", "never", "required")),
            ("references", references, ("value", "allowed")),
            ("text_match", text_match, ("exact", "tokens")),
        ):
            if value not in known:
                raise ValueError(f"{option} is {value!r}; use one of {', '.join(map(repr, known))}.")
        if min_length is not None and max_length is not None and min_length > max_length:
            raise ValueError(f"min_length is {min_length} and max_length {max_length}; exchange them.")
        self.weights = _checked(weights, rl_struct.WEIGHTS if preset else WEIGHTS)
        self.schema = None if schema is None else compile_schema(schema)
        self.output_format: Format = output_format
        self.preset = preset
        self.fence = fence
        self.references = references
        self.text_match: TextMatch = text_match
        self.min_length, self.max_length = min_length, max_length
        self.reasoning_end = reasoning_end
        self.schema_column, self.reference_column = schema_column, reference_column
        self.limits = limits or Limits()
        self.__name__ = name  # TRL names metrics and table columns by it
        self._references: dict[tuple[str, CompiledSchema], Sequence[Target]] = {}
        self.last_scores: list[dict[str, Any]] = []
        self._shared: tuple[Any, set[str], list[dict[str, Any]]] = (None, set(), [])

    # -------------------------------------------------------------------------------------------------- one completion

    def read(self, completion: Source, schema: Any = None) -> Document:
        """The document that a completion is; never raises for a completion."""
        return self._read(completion, self._compiled(schema))

    def score(self, completion: Source, reference: Any = None, schema: Any = None) -> dict[str, Any]:
        """Score of one completion; never raises for a completion.

        Args:
            completion: text, or messages.
            reference: right document, as text in JSON or in the output format, or as an object: of JSON's types, a
                Pydantic model or dataclass, or its `model_dump()`; None if unknown.
            schema: of this row; None is the constructor's.

        Returns:
            "total" = Σ weight · component; every component in [0, 1], or None where it does not apply (no reference,
            no bounds); "reason": None for a flawless document, else its first fault in words.

        Raises:
            SchemaError, ValueError: a bad schema or reference.
        """
        compiled = self._compiled(schema)
        return _named(self._components(completion, self.targets(reference, compiled), compiled))

    def credit(self, completion: Source, reference: Any = None, schema: Any = None) -> Credit:
        """Which characters of a completion earned what (`tokalign.rewards.structured.credit`); arguments as of `score`.

        Never raises for a completion. The same one reading and alignment gives the scores.
        """
        compiled = self._compiled(schema)
        targets = self.targets(reference, compiled)
        document = self._read(completion, compiled)
        leaves = None if is_all_right(document, targets) else list[Leaf]()
        scores = _named(self._components(completion, targets, compiled, document, leaves))
        best = sum([weight for name, weight in self.weights.items() if scores[name] is not None])
        if self.preset is not None:
            return whole_credit(text_of(completion), scores, best)
        shape = None if targets or scores["reason"] is None else compiled.shape
        return credit_of(
            completion,
            document,
            leaves if targets else shape,
            scores,
            best=best,
            limits=self.limits,
            reasoning_end=self.reasoning_end,
            plain_only=self.fence == "never",
            calls=self.output_format == "tool_call",
        )

    def _components(
        self,
        completion: Source,
        reference: Sequence[Target],
        schema: CompiledSchema,
        document: Document | None = None,
        leaves: list[Leaf] | None = None,
    ) -> dict[str, Any]:
        if self.preset is not None:
            bounds = (self.min_length, self.max_length)
            text = answer_of(completion, self.reasoning_end) or ""
            first = reference[0].value if reference else MISSING
            return self._total(rl_struct.components(text, first, schema.schema, bounds, self.limits))
        document = document or self._read(completion, schema)
        if document.value is MISSING:
            return self._of_nothing(document.error, reference)
        try:
            return self._of_document(completion, document, reference, schema, leaves)
        except TooManyValues:
            return self._of_nothing(f"more than {self.limits.max_values} values", reference)
        except RecursionError:  # the caller's own stack is nearly used up
            return self._of_nothing("nested too deep for this interpreter's stack", reference)

    def _of_document(
        self,
        completion: Source,
        document: Document,
        reference: Sequence[Target],
        schema: CompiledSchema,
        leaves: list[Leaf] | None,
    ) -> dict[str, Any]:
        grade, perfect = self._grade(document.value, reference, schema)
        found = self.alignment(document.value, reference, leaves)
        share = 0.0 if found is None else found.share
        # Two calls where one is wanted may hold the right one, but are no document of the schema.
        share = share if grade.attempt or (grade is not _NOTHING and schema.takes(document.value)) else 0.0
        # A document that says something right is an attempt, whatever its types: a type fault costs its value alone.
        if not document.whole or not (grade.attempt or (share and grade.keys)):
            scores = self._zeros(document.error or (lambda: self._fault(document, schema, grade)), reference)
            scores["structure"] = 0.9 * FLOOR * (0.5 + 0.5 / (1 + document.outside / 100)) * grade.keys
            if found is not None:
                scores["correctness"] = share * (1.0 if document.whole else BROKEN if document.broken else AROUND)
            return self._total(scores)
        return self._total(
            {
                "structure": structure(grade),
                "format": presentation(document, self.fence),
                "validity": 1.0,
                "schema": 0.5 * grade.full + 0.5 * perfect,
                "correctness": None if found is None else share,
                "length": self._length(completion, document, perfect),
                "_reason": None if perfect else lambda: self._fault(document, schema, grade),
            }
        )

    def _read(self, completion: Source, schema: CompiledSchema) -> Document:
        return read_document(
            completion,
            self.output_format,
            limits=self.limits,
            reasoning_end=self.reasoning_end,
            wants_list=schema.wants_list,
            types=schema.shape,
        )

    def _grade(self, value: Any, reference: Sequence[Target], schema: CompiledSchema) -> tuple[Grade, bool]:
        """Grade, and whether the document is valid without an invented key."""
        if not value and type(value) in (dict, list):
            # right only where the reference is empty too, or where the schema allows nothing else: else the cheapest of
            # all answers would be worth something
            right = (any(value == form.value for form in reference) or schema.only_empty) and schema.is_valid(value)
            return (_PERFECT, True) if right else (_NOTHING, False)
        perfect = schema.is_perfect(value)
        asked = schema.shape.allowed is not None and (schema.shape.required or isinstance(value, list))
        if perfect and asked and not schema.shape.options:
            return _PERFECT, True  # required keys or items, all of them right: surely an attempt
        grade = schema.grade(value, max_values=self.limits.max_values)
        if perfect is None:
            perfect = grade.keys == 1.0 and not grade.invented and schema.is_valid(value)
        return grade, perfect

    def alignment(self, value: Any, reference: Sequence[Target], leaves: list[Leaf] | None = None) -> Alignment | None:
        """How far a parsed document says what the reference says; of several forms, as the one it fits best.

        Args:
            value: of a `Document`.
            reference: what `targets` gave; without any, the result is None.
            leaves: a list to append that form's leaves to.
        """
        if not reference:
            return None
        if len(reference) == 1:
            return align(value, reference[0], text_match=self.text_match, leaves=leaves)
        best = max(reference, key=lambda form: align(value, form, text_match=self.text_match).share)
        return align(value, best, text_match=self.text_match, leaves=leaves)

    def _length(self, completion: Source, document: Document, perfect: bool) -> float | None:
        if self.min_length is None and self.max_length is None:
            return None
        # What is too short is judged by the document alone, or white space and comments would fill it up; what is too
        # long by all that was written, or they would be free. A message's parsed tool calls stand in no text.
        said = len(json.dumps(document.value, ensure_ascii=False))
        text = answer_of(completion, self.reasoning_end)
        written = len(text) if text else said
        within = (self.min_length or 0) <= said and (self.max_length is None or written <= self.max_length)
        return 1.0 if perfect and within else 0.0

    def _of_nothing(self, reason: Any, reference: Sequence[Target]) -> dict[str, Any]:
        return self._total(self._zeros(reason, reference))

    def _zeros(self, reason: Any, reference: Sequence[Target]) -> dict[str, Any]:
        scores: dict[str, Any] = dict.fromkeys(COMPONENTS, 0.0)
        if not reference:
            scores["correctness"] = None
        if self.min_length is None and self.max_length is None:
            scores["length"] = None
        scores["_reason"] = reason
        return scores

    def _fault(self, document: Document, schema: CompiledSchema, grade: Grade) -> str:
        try:
            error = schema.first_error(document.value, grade)
        except (TooManyValues, RecursionError):
            error = None
        return error or "nothing of what the schema asks for"

    def _total(self, scores: dict[str, Any]) -> dict[str, Any]:
        scores["total"] = sum([weight * scores[name] for name, weight in self.weights.items() if scores[name]], 0.0)
        return scores

    # ------------------------------------------------------------------------------------------- schemas and references

    def _compiled(self, schema: Any) -> CompiledSchema:
        if schema is None:
            return self.schema or NO_SCHEMA
        return compile_text(schema) if isinstance(schema, str) else compile_schema(schema)

    def targets(self, reference: Any, schema: CompiledSchema) -> Sequence[Target]:
        """A reference made ready: one target, several where the JSON of an object depends on its model, none for None.

        Raises:
            ValueError: it cannot be read.
        """
        if reference is None:
            return ()
        if isinstance(reference, str):
            key = (reference, schema)
            if key in self._references:  # the completions of a group share one
                return self._references[key]
            if len(self._references) >= _KEPT:
                self._references.clear()
            self._references[key] = self._parsed(reference, schema)
            return self._references[key]
        return self._parsed(reference, schema)

    def _parsed(self, reference: Any, schema: CompiledSchema) -> Sequence[Target]:
        if isinstance(reference, str):
            try:
                check_limits(reference, self.limits)
                forms = [decode_json(reference)]
            except ValueError as error:
                document = MISSING if self.output_format == "json" else self._read(reference, schema).value
                if document is MISSING:
                    raise ValueError(f"is not JSON ({str(error)[:200]}); give the right document as JSON") from None
                forms = [document]
        else:
            forms = _plain(reference, NO_SCHEMA if self.references == "allowed" else schema)
        if self.references == "allowed" and not is_allowed_reference(forms[0]):
            raise ValueError(
                'is not of the form {"name": …, "arguments": {argument: [allowed value, …]}} or a list of such calls; '
                "give it so, or set references to 'value'"
            )
        kind = AllowedAligner if self.references == "allowed" else Aligner
        kind = CallAligner if kind is Aligner and self.output_format == "tool_call" else kind
        return [target_of(form, schema.shape, kind) for form in forms]

    def check_row(self, schema: Any = None, reference: Any = None) -> None:
        """Raise what scoring a row of the dataset would raise for its schema or reference."""
        self.targets(reference, self._compiled(schema))

    def check_columns(self, names: Collection[str], what: str) -> None:
        """Raise where rows lack a column without which this reward would judge something else than it was asked to.

        Args:
            names: columns of the rows.
            what: what to call the rows, e.g. "The training dataset".

        Raises:
            ContractError: naming the column and the remedy.
        """
        # A column that the caller named must be there; one of the default name only where nothing stands in for it
        if self.schema_column not in names and (self.schema is None or self.schema_column != SCHEMA_COLUMN):
            otherwise = " and no schema is given for all rows; set `schema` to a JSON Schema file, or"
            raise ContractError(
                f"{what} has no column `{self.schema_column}`{otherwise if self.schema is None else '; set'} "
                "`schema_column` to the column that holds them, and leave `remove_unused_columns` false."
            )
        if self.reference_column in names or "correctness" not in self.active:
            return
        if self.reference_column != REFERENCE_COLUMN:
            raise ContractError(
                f"{what} has no column `{self.reference_column}`; set `reference_column` to the column that holds the "
                "right documents, or leave the component correctness out of the weights."
            )
        warnings.warn(
            f"Rows have no column `{REFERENCE_COLUMN}`: the component correctness is off, and the reward cannot see "
            "what a document says: placeholders that fit the schema have full marks.",
            stacklevel=1,
        )

    # -------------------------------------------------------------------------------------------------------- a batch

    def __call__(
        self,
        prompts: Sequence[Any] | None = None,
        completions: Sequence[Any] = (),
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Totals of a batch, as TRL's trainers call it: `columns` holds one value a completion."""
        return [row["total"] for row in self.score_batch(completions, log_extra, log_metric, **columns)]

    def score_batch(
        self,
        completions: Sequence[Any],
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[dict[str, Any]]:
        """`score` of every completion, without "reason"; kept as `last_scores` until the next batch.

        Raises:
            ContractError, SchemaError, ValueError: a column that is missing, a bad schema or reference, with its row.
        """
        if completions:
            self.check_columns(columns, "The batch")
        schemas = columns.get(self.schema_column) or [None] * len(completions)
        references = columns.get(self.reference_column) or [None] * len(completions)
        rows: list[dict[str, Any]] = []
        reasons: list[str | None] = []
        for index, completion in enumerate(completions):
            schema, reference = schemas[index], references[index]
            try:
                if schema is None and self.schema is None:
                    raise SchemaError("is missing; give it a JSON Schema, or drop the row")
                compiled = self._compiled(schema)
                parsed = self.targets(reference, compiled)
            except ValueError as error:
                identity = columns["id"][index] if "id" in columns else index
                column = self.schema_column if isinstance(error, SchemaError) else self.reference_column
                raise ValueError(f"Row {identity!r}: `{column}`: {error}") from None
            row = self._components(completion, parsed, compiled)
            reason = row.pop("_reason")  # asked for now or never: it keeps the whole document
            if log_extra is not None:
                reasons.append(reason() if callable(reason) else reason)
            rows.append(row)
        self.last_scores = rows
        prefix = "" if self.__name__ == NAME else f"{self.__name__}/"
        for component in self.active:
            values = [row[component] for row in rows if row[component] is not None]
            if log_metric is not None and values:
                log_metric(f"{self.__name__}/{component}", sum(values) / len(values))
            if log_extra is not None:
                log_extra(f"{prefix}{component}", [row[component] for row in rows])
        if log_extra is not None:
            log_extra(f"{prefix}reason", reasons)
        return rows

    def score_shared(self, component: str, completions: Sequence[Any], **columns: Any) -> list[dict[str, Any]]:
        """`score_batch` for one of several components: a batch is scored and logged for the first that asks for it.

        What a batch holds decides, not which list it is: lists may be changed and used again. A component that asks a
        second time has a new batch before it, though it be equal to the last one.
        """
        asked = [completions, columns.get(self.schema_column), columns.get(self.reference_column)]
        if component in self._shared[1] or not equal(asked, self._shared[0]):
            self._shared = (deepcopy(asked), set(), self.score_batch(completions, **columns))
        self._shared[1].add(component)
        return self._shared[2]

    @property
    def active(self) -> list[str]:
        """Components with a weight; length counts among them only with bounds."""
        bounded = self.min_length is not None or self.max_length is not None
        return [name for name in COMPONENTS if self.weights.get(name) and (name != "length" or bounded)]

    def component_rewards(self) -> list[ComponentReward]:
        """One reward function a component, for trainers that normalise each before they sum (GDPO).

        They share this reward's one reading of a batch; give the trainer `[self.weights[c] for c in self.active]`.
        """
        return [ComponentReward(self, name) for name in self.active]


class ComponentReward:
    """One component of a `StructuredReward` as a reward function of its own; None where it does not apply."""

    def __init__(self, reward: StructuredReward, component: str):
        self.reward, self.component = reward, component
        self.__name__ = f"{reward.__name__}_{component}"

    def __call__(
        self, prompts: Sequence[Any] | None = None, completions: Sequence[Any] = (), **columns: Any
    ) -> list[float | None]:
        rows = self.reward.score_shared(self.component, completions, **columns)
        return [row[self.component] for row in rows]


def structure(grade: Grade) -> float:
    """Structure of an answer from its grade of keys and types."""
    return FLOOR + (1 - FLOOR) * grade.keys


def presentation(document: Document, fence: str) -> float:
    """The component format of an answer: whether its fence is as asked."""
    return 1.0 if fence == "optional" or document.fenced is (fence == "required") else 0.0


def _named(scores: dict[str, Any]) -> dict[str, Any]:
    """Scores with their reason in words."""
    reason = scores.pop("_reason")
    return {**scores, "reason": reason() if callable(reason) else reason}


def _checked(weights: Mapping[str, float] | None, default: Mapping[str, float]) -> dict[str, float]:
    if weights is None:
        return dict(default)
    for name, weight in weights.items():
        if name not in COMPONENTS:
            raise ValueError(f"Unknown component {name!r}; components are {', '.join(COMPONENTS)}.")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"The weight of {name} is {weight}; use 0 (off) or a positive number.")
    if not any(weights.values()):
        raise ValueError("All components are off; give at least one a positive weight.")
    return {name: float(weights[name]) for name in COMPONENTS if weights.get(name)}


def _plain(reference: Any, schema: CompiledSchema) -> list[Any]:
    """The forms in JSON's types of an object of any kind (a Pydantic model, a dataclass, dates within).

    Raises ValueError where it has no JSON, or none that fits the schema.
    """
    try:
        plain = pydantic_core.to_jsonable_python(reference, **_KINDS[0])
        if plain == reference:
            return [plain]
        forms = [plain, *(pydantic_core.to_jsonable_python(reference, **kind) for kind in _KINDS[1:])]
    except ValueError as error:
        raise ValueError(f"cannot be read as JSON ({str(error)[:200]}); give the right document as JSON") from None
    # What was not JSON has its form from the model that it is a dump of. That is not known here, so each form that fits
    # the schema is right.
    fitting = [form for index, form in enumerate(forms) if form not in forms[:index] and schema.is_valid(form)]
    if not fitting:
        reason = schema.first_error(plain)
        raise ValueError(f"as JSON does not fit the schema ({reason}); give the right document as JSON")
    return fitting
