"""Whether two final answers are the same (`answers_match`).

An answer is read into a normal form first: a number (an exact rational), a word, or a list, tuple, interval,
union or matrix of further answers. Two forms of different shape never match, so `(1,2)`, `1,2` and `12` stay
apart whatever a symbolic library makes of them. Only what is left, expressions with symbols or roots, goes
to math-verify (`equivalence.py`). Conventions and bounds: `docs/answers.md`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

from tokalign.rewards.answers.equivalence import equivalent
from tokalign.rewards.answers.forms import read_form, unwrap
from tokalign.rewards.answers.notation import plain_notation
from tokalign.rewards.answers.quantities import VAGUE_UNITS, Form

EXPRESSION_CAP = 200  # characters that go to the symbolic library
MATCH_SECONDS = 15.0  # all symbolic comparisons of one `answers_match`

_DECIMAL_IN_EXPRESSION = re.compile(r"(?<![\d.])(\d{0,20})\.(\d{1,20})(?![\d.])")
_REFUSED = re.compile(
    r"[$#&@~`'\"|_:?%°]|\d [\d.\\]|\d{31}|\\(?:sum|prod|int|lim|begin|def|input|text)"  # no closed form, or ambiguous
    r"|\\(?:over|under)line|\.\.\.|dots|\d{4,}!|!!"
    r"|\^ ?[{(]? ?-?\d{4}"  # giant powers
    r"|\^[^-+=<>]{0,40}\^"  # towers of powers
)
_COMMAND = re.compile(r"\\[A-Za-z]+")


@lru_cache(maxsize=65_536)
def _symbolically_equal(prediction: str, reference: str) -> bool:
    # What may reach a computer algebra system: short, without words, and without what has no closed form or would take
    # it minutes. The text is written by a policy that is paid for passing this test.
    sides = []
    for text in (prediction, reference):
        # four letters in a row are a word, and to a computer algebra system words are products: east = seat
        if not text or len(text) > EXPRESSION_CAP or _REFUSED.search(text):
            return False
        if re.search(r"[A-Za-z]{4}", _COMMAND.sub(" ", text)):
            return False
        sides.append(
            # exact decimals: the library would round 0.1 to a float
            _DECIMAL_IN_EXPRESSION.sub(lambda m: rf"{{\frac{{{m[1]}{m[2]}}}{{{10 ** len(m[2])}}}}}", text)
        )
    return equivalent(*sides)


def _relations(text: str) -> int:
    return len(re.findall(r"[<>=]|\\(?:leq?|geq?|neq?)(?![a-z])", text))


def _plain(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _equation(form: Form) -> str | None:
    """The text of an equation between variables, such as "y = 2x + 3"; "2x = 4" only leaves the value of x to find."""
    if form.kind != "expression" or form.unit:
        return None
    text = f"{form.name}={form.text}" if form.name else form.text
    letters = {letter for letter in _COMMAND.sub(" ", text) if letter.isalpha()} - {"e", "i"}
    return text if len(letters) > 1 and text.count("=") == _relations(text) == 1 else None


def _units_differ(first: str, second: str) -> bool:
    vague = second in VAGUE_UNITS.get(first, ()) or first in VAGUE_UNITS.get(second, ())
    return bool(first and second and first != second and not vague)


def _in_order_of_names(form: Form, names: str) -> tuple[Form, ...]:
    """`x = 1, y = 2` in the order of "(x,y)", or of the alphabet where no names are given; () for another list."""
    by_name = {part.name: replace(part, name="") for part in form.parts if part.name}
    order = names.strip("()").split(",") if names else sorted(by_name)
    if len(by_name) < max(2, len(form.parts)) or set(order) != set(by_name):
        return ()
    return tuple(by_name[name] for name in order)


def _same(prediction: Form, reference: Form, deadline: float) -> bool:
    if prediction.name != reference.name:
        equations = _equation(prediction), _equation(reference)
        if equations[0] and equations[1] and time.monotonic() <= deadline:
            return _symbolically_equal(*equations)
        if prediction.name and reference.name:
            return False
    if _units_differ(prediction.unit, reference.unit):
        return False
    if {prediction.kind, reference.kind} == {"list", "()"}:
        named, pair = (prediction, reference) if prediction.kind == "list" else (reference, prediction)
        ordered = _in_order_of_names(named, pair.name)
        return len(ordered) == len(pair.parts) and _same_in_order(ordered, pair.parts, deadline)
    # Shape before content: (1, 2), the list 1, 2 and the number 12 stay apart, whatever the library makes of them.
    if prediction.parts or reference.parts:
        if prediction.kind == reference.kind and len(prediction.parts) == len(reference.parts):
            compare = _same_in_any_order if prediction.kind in ("list", "union") else _same_in_order
            return compare(prediction.parts, reference.parts, deadline)
        if not (prediction.text and reference.text):
            return False  # an inequality that is not solved goes on, to the library
    elif prediction.value == reference.value and (
        prediction.kind == reference.kind or {prediction.kind, reference.kind} == {"ratio", "number"}
    ):
        return True
    if _relations(prediction.text) != _relations(reference.text):
        return False  # the library would read the 0 of "x + y = 0" as its value
    kinds = {form.kind for form in (prediction, reference) if not form.parts}
    if "expression" not in kinds or kinds - {"expression", "number"} or time.monotonic() > deadline:
        return False
    sides = [_plain(f.value) if isinstance(f.value, Fraction) else f.text for f in (prediction, reference)]
    return _symbolically_equal(*sides)


def _same_in_order(prediction: Sequence[Form], reference: Sequence[Form], deadline: float) -> bool:
    return all(_same(p, r, deadline) for p, r in zip(prediction, reference, strict=True))


def _same_in_any_order(prediction: Sequence[Form], reference: Sequence[Form], deadline: float) -> bool:
    left = list(reference)
    later = []
    for form in prediction:  # what is written alike first, so that the library sees only the rest
        if form in left:
            left.remove(form)
        else:
            later.append(form)
    for form in later:
        partner = next((other for other in left if _same(form, other, deadline)), None)
        if partner is None:
            return False
        left.remove(partner)
    return True


# A letter of a multiple choice, alone or before the text of its option: "b", "Option B", "(B) 18", "E: some text".
_OPTION = re.compile(r"(?i:(option|choice|answer)[ _])?(?:\( ?([A-Ja-j]) ?\)|([A-Ja-j]))([.):]?)(?: (.*)|$)", re.DOTALL)
_MATH_LETTER = re.compile(r"\$ ?(\(?[A-J]\)?) ?\$")
# Text that does not name an option: another option's letter, more of an expression, or a remark on the letter.
_NOT_AN_OPTION = re.compile(
    r"-(?: |$)|[+*/^=<>,;&|]|(?:is|are|was|or|and|nor|not|but)(?![a-z])|"
    r".{0,200}?(?:\( ?[A-Ja-j] ?\)|(?<![A-Za-z])(?:[A-J](?:[.):]|$)|[a-j]\)))",
    re.DOTALL,
)


@lru_cache(maxsize=8_192)
def _option(answer: str) -> tuple[str, str] | None:
    """The letter of an answer to a multiple choice and the text behind it."""
    if len(answer) > EXPRESSION_CAP or not (
        match := _OPTION.fullmatch(unwrap(_MATH_LETTER.sub(r"\1", plain_notation(answer))))
    ):
        return None
    word, bracketed, bare, mark, rest = match.groups(default="")
    # Alone, e and i are numbers. Before a text the letter has to be set off: "a 5" is none.
    if (bare in ("e", "i") and not (word or mark)) or (rest and not (bracketed or mark)):
        return None
    return None if rest and _NOT_AN_OPTION.match(rest) else ((bracketed or bare).upper(), rest)


def _same_option(prediction: str, reference: str, deadline: float) -> bool:
    """Whether both choose one letter; where only one side has a letter, whether its text is the other answer."""
    chosen, expected = _option(prediction), _option(reference)
    if chosen is None and expected is None:
        return False
    letter, text = chosen or ("", prediction)
    other_letter, other_text = expected or ("", reference)
    if letter and other_letter and (letter != other_letter or not text or not other_text):
        return letter == other_letter
    return bool(text and other_text) and _same(read_form(text), read_form(other_text), deadline)


def answers_match(prediction: str | None, reference: str | Sequence[str] | None) -> bool:
    """Whether a final answer is right.

    Args:
        prediction: a final answer, such as `extract_answer` returns (not a whole completion); None never
        matches. reference: the ground truth, or a list of accepted ones (any of them matches); None never
        matches.

    Numbers compare exactly, as rationals: 18.50 = 18.5 = 37/2, and 0.333 ≠ 1/3. A unit counts only where
    both sides name one (`50%` matches `50`, not `0.5`; `5 cm` does not match `5 m`). Lists and sets match in
    any order, tuples, intervals and matrices element by element with the same brackets. Other expressions
    match when math-verify proves them equal within its time; running out of time is no match. An inequality
    matches its interval, and a letter A to J matches in either case, with or without its option's text.
    Symmetric, safe in threads, never evaluates code, bounded on any input.
    """
    if prediction is None or reference is None:
        return False
    if not isinstance(reference, str):
        return any(answers_match(prediction, accepted) for accepted in reference)
    if not prediction.strip() or not reference.strip():
        return False
    deadline = time.monotonic() + MATCH_SECONDS
    return _same(read_form(prediction), read_form(reference), deadline) or _same_option(prediction, reference, deadline)
