"""Field credit: a field of a structured answer is judged against the same field of its group's other completions.

    A_{i,t} = w A^form_i + λ Σ_d 1[t ∈ span_{i,d}] (c_{i,d} − mean_G c_d) / (std_G c_d + ε)

for completion i of a group G, its token t, and the decisions d that the reference judges. Each path p of the reference
is two of them, each over the completions of the group that came to it:

- that p is there, on the tokens of its key and of the comma before it, which chose to go on: c = 1. Where p is missing,
  c = 0 on the bracket that closes the object which lacks it. A completion that broke off lacks nothing, since it never
  came to close.
- what stands at p, on the tokens of its value: c in [0, 1] says how far it is right. Who lacks p has no say in it.

What a completion invented is a third kind: c = 0 on its own tokens, and 1 for those that did not. A^form is the
group-relative advantage of what the reward's form components are worth together, so the right number in a malformed
document is praised as number, and the malformed rest is blamed as form.

Where the reward cannot say which characters are at fault (YAML, XML), or a completion's ids do not spell its text, the
completion keeps the advantage of its sequence on all of its tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from accelerate.utils import gather_object

from tokalign.rewards import StructuredReward
from tokalign.rewards.structured.credit import Span
from tokalign.rewards.structured.documents.reading import text_of
from tokalign.rewards.structured.reward import NAME
from tokalign.stage.pieces import spans_to_tokens, token_offsets

CHARGED = ("value", "missing", "invented")  # components of spans that are fields
PLACED = ("json", "tool_call")  # formats in which the reward knows where a value stands
Field = tuple[str, str]  # JSON pointer, and which decision there: "there", "value" or "invented"


@dataclass(frozen=True)
class Judged:
    """What a completion's group must know of it.

    Attributes:
        values: c of each decision that it came to, in [0, 1].
        form: what its form components are worth.
    """

    values: Mapping[Field, float]
    form: float


@dataclass(frozen=True)
class Charged:
    """Where a completion's advantages fall.

    Attributes:
        length: its tokens.
        tokens: indices of each decision's tokens; None if they are not known.
        faults: indices of tokens that are no part of a document: text around it, and all from where it broke.
    """

    length: int
    tokens: Mapping[Field, Sequence[int]] | None = None
    faults: Sequence[int] = ()


@dataclass
class FieldCredit:
    """Credit of a structured reward's fields, as a credit function of [`TokenCreditGRPOTrainer`].

    Args:
        reward: whose sequence advantage this replaces; None is the one structured reward that the trainer has.
        coefficient: factor of the whole, as a reward's weight is.
        value_weight: λ, of the fields.
        form_weight: w, of the form; 0 leaves it out.
        epsilon: ε.
        scale: "group" divides a field's advantage by its standard deviation in the group; "none" does not, so a field
            that is nearly always right moves little.
        form_scale: the same of the form.
        form_on: "all" has A^form on all tokens. "place": the text around a document, and what follows a break, has
            nothing but A^form, and that only below 0, where the other tokens have none of it; a completion without such
            text has A^form on all tokens.
        overlap: "sum" of the decisions of a token (a bracket that lacks several values), or their "mean".
    """

    reward: StructuredReward | None = None
    coefficient: float = 1.0
    value_weight: float = 1.0
    form_weight: float = 1.0
    epsilon: float = 1e-4
    scale: Literal["group", "none"] = "group"
    form_scale: Literal["group", "none"] = "group"
    form_on: Literal["all", "place"] = "all"
    overlap: Literal["sum", "mean"] = "sum"
    mode: str = field(default="advantage", init=False)
    reads: tuple[str, ...] = field(default=(), init=False)
    trainer: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.__name__ = "field"  # not a field of the dataclass, which would rename the class
        if self.reward is not None:
            self._credit(self.reward)

    def _credit(self, reward: StructuredReward) -> None:
        if reward.preset is not None:
            raise ValueError(f"The preset {reward.preset!r} does not know fields; set credit to 'sequence'.")
        self.reward = reward
        self.__name__ = "field" if reward.__name__ == NAME else f"field_{reward.__name__}"

    @property
    def replaces(self) -> tuple[Any, ...]:
        return (self.reward,)

    def attach(self, trainer: Any) -> None:
        self.trainer = trainer
        if self.reward is None:
            found = [function for function in trainer.reward_funcs if isinstance(function, StructuredReward)]
            if len(found) != 1:
                raise ValueError(
                    f"The credit 'field' follows one StructuredReward, and `reward_funcs` has {len(found)}; give one, "
                    "or pass `credit_funcs=[FieldCredit(reward), …]`."
                )
            self._credit(found[0])

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        rewards: Sequence[float],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[list[float] | None]:
        """Advantages of this process's completions, one number a token; None for one that keeps its sequence's.

        Groups lie next to each other in the order of all processes; one that spans processes is gathered.
        """
        assert self.reward is not None
        schemas = columns.get(self.reward.schema_column) or [None] * len(completions)
        references = columns.get(self.reward.reference_column) or [None] * len(completions)
        rows = [self.judge(*row) for row in zip(completions, completion_ids, references, schemas, strict=True)]
        if log_metric is not None and rows:
            unread = sum(charged.tokens is None for _, charged in rows)
            log_metric(f"credit/{self.__name__}/by_sequence", unread / len(rows))
        group = self.trainer._mode_and_group()[1]
        judged, charged = [row[0] for row in rows], [row[1] for row in rows]
        first = 0
        if len(rows) % group:  # every process has equally many rows, so all of them gather or none does
            first = self.trainer.accelerator.process_index * len(rows)
            judged = gather_object(judged)
        return self.advantages(judged, charged, group, first)

    # -------------------------------------------------------------------------------------------- from spans to tokens

    def judge(self, completion: Any, ids: Sequence[int], reference: Any, schema: Any) -> tuple[Judged, Charged]:
        """A completion's fields from the reward's spans, and the tokens that they are charged on."""
        assert self.reward is not None
        text, credit = text_of(completion), self.reward.credit(completion, reference, schema)
        weights, scores = self.reward.weights, credit.scores
        form = sum(w * (scores[name] or 0.0) for name, w in weights.items() if name != "correctness")
        cut = any(span.component == "broken" for span in credit.spans)
        spans = [
            _from_comma(span, text) if span.component in ("key", "invented") else span
            for span in credit.spans
            if not (cut and span.component == "missing")
        ]
        values: dict[Field, float] = {}
        for span in spans:
            if span.component in CHARGED:
                values[_field(span)] = span.value
            if span.component == "value":
                values[span.pointer, "there"] = 1.0
        # A text that is no document is all broken in every format, but where the others of its group are judged whole,
        # so is it.
        exact = credit.exact and self.reward.output_format in PLACED
        judged = Judged(values if exact else {}, form)
        tokenizer = self.trainer.processing_class
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        offsets = token_offsets(tokenizer, ids, text) if exact else None
        if offsets is None:
            return judged, Charged(len(ids))
        tokens: dict[Field, set[int]] = {}
        faults: set[int] = set()
        touched = list(zip(spans, spans_to_tokens(offsets, spans), strict=True))
        # A key is the value's that follows it; its own pointer is the document's, the value's the reference's.
        keys = sorted((span.end, indices) for span, indices in touched if span.component == "key")
        ends = [end for end, _ in keys]
        for span, indices in touched:
            if span.component in ("around", "broken"):
                faults.update(indices)
            elif span.component in CHARGED:
                tokens.setdefault(_field(span), set()).update(indices)  # a token on two spans of one counts once
                before = bisect_right(ends, span.start) - 1
                if span.component == "value" and before >= 0 and not text[ends[before] : span.start].strip():
                    tokens.setdefault((span.pointer, "there"), set()).update(keys[before][1])
        return judged, Charged(len(ids), {name: sorted(found) for name, found in tokens.items()}, sorted(faults))

    # ------------------------------------------------------------------------------------------------- the mathematics

    def advantages(
        self, judged: Sequence[Judged], charged: Sequence[Charged], group: int, first: int = 0
    ) -> list[list[float] | None]:
        """The equation.

        Args:
            judged: of all completions, a multiple of `group`; groups lie next to each other.
            charged: of the completions `first`, `first + 1`, … of these.
            group: completions of a prompt.
            first: index in `judged` of the first of `charged`.

        Returns:
            one list a completion in `charged`, as long as its tokens; None where they are not known.
        """
        made: list[list[float] | None] = []
        for start in range(first - first % group, first + len(charged), group):
            members = judged[start : start + group]
            fields = field_advantages([member.values for member in members], self.scale, self.epsilon)
            forms = relative([member.form for member in members], self.form_scale, self.epsilon)
            for index in range(max(start, first), min(start + group, first + len(charged))):
                place, row = index - start, charged[index - first]
                if row.tokens is None:
                    made.append(None)
                    continue
                made.append(self._of_tokens(row, row.tokens, fields[place], self.form_weight * forms[place]))
        return made

    def _of_tokens(
        self, row: Charged, tokens: Mapping[Field, Sequence[int]], fields: Mapping[Field, float], form: float
    ) -> list[float]:
        sums, counts = [0.0] * row.length, [0] * row.length
        for name, indices in tokens.items():
            for token in indices:
                sums[token] += fields[name]
                counts[token] += 1
        if self.overlap == "mean":
            sums = [total / max(count, 1) for total, count in zip(sums, counts, strict=True)]
        if self.form_on == "all" or not row.faults:
            return [form + self.value_weight * total for total in sums]
        at_fault = set(row.faults)
        return [
            min(form, 0.0) if token in at_fault else max(form, 0.0) + self.value_weight * total
            for token, total in enumerate(sums)
        ]


def _field(span: Any) -> Field:
    return span.pointer, "there" if span.component == "missing" else span.component


def _from_comma(span: Span, text: str) -> Span:
    """The span of a key, or of something invented, from the comma before it."""
    start = span.start
    while start and text[start - 1] in " \t\r\n,":
        start -= 1
    return Span(span.pointer, start, span.end, span.component, span.value)


def field_advantages(rows: Sequence[Mapping[Field, float]], scale: str, epsilon: float) -> list[dict[Field, float]]:
    """The group-relative advantage of every decision of every completion of one group, by decision.

    Over those that came to it: a completion that lacks a value, or broke off before it, would have 0 there and make a
    wrong value look good. That nothing was invented is 1 for all others.
    """
    made: list[dict[Field, float]] = [{} for _ in rows]
    for name in dict.fromkeys(name for row in rows for name in row):
        others = name[1] == "invented"
        came = [(own, row.get(name, 1.0)) for own, row in zip(made, rows, strict=True) if others or name in row]
        for (own, _), number in zip(came, relative([value for _, value in came], scale, epsilon), strict=True):
            own[name] = number
    return made


def relative(values: Sequence[float], scale: str, epsilon: float) -> list[float]:
    """(v − mean) / (std + ε) of one group with TRL's standard deviation (of n − 1), or v − mean; one value has 0."""
    mean = math.fsum(values) / len(values)
    centered = [value - mean for value in values]
    if scale == "none" or len(values) < 2:
        return centered
    std = math.sqrt(math.fsum(value * value for value in centered) / (len(values) - 1))
    return [value / (std + epsilon) for value in centered]
