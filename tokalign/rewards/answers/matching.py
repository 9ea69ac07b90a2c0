"""Final answers: finding one in a completion (`extract_answer`) and comparing two (`answers_match`).

An answer is read into a normal form first: a number (an exact rational), a word, or a list, tuple, interval,
union or matrix of further answers. Two forms of different shape never match, so `(1,2)`, `1,2` and `12` stay
apart whatever a symbolic library makes of them. Only what is left, expressions with symbols or roots, goes
to math-verify (`equivalence.py`). Conventions and bounds: `docs/answers.md`. Data: GSM8K (Cobbe et al.
2021, arXiv 2110.14168), MATH (Hendrycks et al. 2021, arXiv 2103.03874).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from tokalign.rewards.answers.equivalence import equivalent
from tokalign.rewards.answers.forms import Form, plain_number, read_form, unwrap

TEXT_CAP = 20_000  # characters, from the end of a completion, in which an answer is looked for
EXPRESSION_CAP = 200  # characters that go to the symbolic library
MATCH_SECONDS = 15.0  # all symbolic comparisons of one `answers_match`

# -------------------------------------------------------------------------------------------------------
# extraction

_BOX_TOKENS = re.compile(r"(\\f?box(?:ed)?\s?\{)|\\.|[{}]", re.DOTALL)
_PHRASE = re.compile(
    r"(?i:\banswers?\b[*_]{0,2}(?:[ \t]{0,4}(?:is|are|[:=])[*_]{0,2}){1,2}|^[ \t>*]{0,8}A[ \t]?:[*_]{0,2})",
    re.MULTILINE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
_LEADING_NUMBER = re.compile(  # followed by prose, not by more of an expression or of a list
    r"[ \t]*+(-? ?[$£€]? ?-?(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++|/\d++)?+ ?%?)"
    r"[ ,;:(*]{1,4}(?!(?:and|sqrt|sin|cos|tan|cot|sec|csc|log|exp|plus|minus|times|over)(?![a-z]))[A-Za-z]{3}"
)
_INLINE_MATH = re.compile(r"\s{0,9}(?:\$([^$\n]{1,2000})\$|\\\((.{1,2000}?)\\\))")
_NUMBER_IN_TEXT = re.compile(r"(?<![\d.,A-Za-z])-?[$£€]?(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++|/\d++)?+")


def _tidy(content: str) -> str | None:
    content = " ".join(content.split())
    form = read_form(content)
    if form.kind == "number" and not form.name:
        return plain_number(form, fraction="/" in content or "frac" in content)
    return unwrap(content) or None


def _last_marked(text: str) -> str | None:
    """After the last `####`: a number on any line, anything else on the last line only (elsewhere it is a heading)."""
    text = text.rstrip("#* \t\n")
    end = len(text)
    for _ in range(1000):  # headings may follow the answer; nobody writes a thousand
        start = text.rfind("####", 0, end)
        if start < 0:
            return None
        line, newline, _ = text[start + 4 : end].partition("\n")
        line, last_line = line.strip("# \t"), end == len(text) and not newline
        if phrases := list(_PHRASE.finditer(line)):
            line = line[phrases[-1].end() :]
        if line.strip() and (last_line or read_form(line).kind in ("number", "digits")):
            return line
        end = start
    return None


def _last_boxed(text: str) -> str | None:
    """Content of the last complete box, braces nested to any depth; one pass over the text."""
    # A stack rather than a pattern: boxes hold braces of any depth, and a completion may leave some open.
    open_braces: list[int] = []  # start of the content for a box, -1 for any other brace
    best: tuple[int, int] | None = None
    for token in _BOX_TOKENS.finditer(text):
        if token[1]:
            open_braces.append(token.end())
        elif token[0] == "{":
            open_braces.append(-1)
        elif token[0] == "}" and open_braces:
            start = open_braces.pop()
            if start >= 0 and (best is None or start > best[0]):
                best = start, token.start()
    return None if best is None else text[best[0] : best[1]]


def _last_phrase(text: str) -> str | None:
    """What follows the last "answer is", "answer:" or line-initial "A:", up to the end of the sentence."""
    ends = [phrase.end() for phrase in _PHRASE.finditer(text)]
    if not ends:
        return None
    content = text[ends[-1] :].lstrip(" \t\n*_")
    if math := _INLINE_MATH.match(content):
        return math[1] or math[2]
    if end := _SENTENCE_END.search(content):
        content = content[: end.start()]
    # People write the sum before its result; the result is the answer, unless the left side names an unknown.
    left, equals, right = content.rpartition("=")  # "3 + 4 = 7"
    if equals and not any(map(str.isalpha, left)) and read_form(right).kind == "number":
        return right
    if read_form(content).kind in ("expression", "list") and (number := _LEADING_NUMBER.match(content)):
        return number[1]  # "18, because …"
    return content


def _json_answer(text: str) -> str | None:
    """The `answer` of a completion that is one JSON object, bare or in a code fence."""
    text = text.strip()
    if text.startswith("```") and text.endswith("```"):
        text = text[3:-3].removeprefix("json").strip()
    if not (text.startswith("{") and text.endswith("}")):
        return None
    try:
        # numbers stay text: exact, and of any length
        document = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except (json.JSONDecodeError, RecursionError):
        return None
    answer = document.get("answer")
    if isinstance(answer, list) and all(isinstance(element, str) for element in answer):
        answer = ", ".join(answer)
    return answer if isinstance(answer, str) else None


def extract_answer(text: str, *, last_number: bool = False) -> str | None:
    r"""The final answer that a completion states, or None.

    Args:
        text: a completion or a worked solution; only its last `TEXT_CAP` characters are looked at.
        last_number: with nothing else found, take the last number of the text (the field's lenient
        convention).

    In this order: the `answer` of a completion that is a JSON object; the last `#### …`; the last complete
    `\boxed{…}`; the last "answer is …", "answer: …" or line that starts with "A:". Returns a number without
    currency, separators, unit and trailing zeros ("$1,234.50" is "1234.5", "6/8" is "3/4"), any other answer
    as written without its delimiters. Linear in the text.
    """
    if len(text) <= TEXT_CAP and (answer := _json_answer(text)) is not None:
        return _tidy(answer)
    text = text[-TEXT_CAP:]
    # From the most deliberate mark to the least. The last one counts: a solution may box steps on its way.
    for find in (_last_marked, _last_boxed, _last_phrase):
        if (content := find(text)) is not None and (answer := _tidy(content)) is not None:
            return answer
    if last_number and (numbers := _NUMBER_IN_TEXT.findall(text)):
        return _tidy(numbers[-1])
    return None


# -------------------------------------------------------------------------------------------------------
# comparison

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


def _same(prediction: Form, reference: Form, deadline: float) -> bool:
    if prediction.name and reference.name and prediction.name != reference.name:
        return False
    if prediction.unit and reference.unit and prediction.unit != reference.unit:
        return False
    # Shape before content: (1, 2), the list 1, 2 and the number 12 stay apart, whatever the library makes of them.
    if prediction.parts or reference.parts:
        if prediction.kind != reference.kind or len(prediction.parts) != len(reference.parts):
            return False
        compare = _same_in_any_order if prediction.kind in ("list", "union") else _same_in_order
        return compare(prediction.parts, reference.parts, deadline)
    if prediction.kind == reference.kind and prediction.value == reference.value:
        return True
    if _relations(prediction.text) != _relations(reference.text):
        return False  # the library would read the 0 of "x + y = 0" as its value
    kinds = {prediction.kind, reference.kind}
    if kinds not in ({"expression"}, {"expression", "number"}) or time.monotonic() > deadline:
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


def answers_match(prediction: str | None, reference: str | Sequence[str] | None) -> bool:
    """Whether a final answer is right.

    Args:
        prediction: a final answer, such as `extract_answer` returns (not a whole completion); None never
        matches. reference: the ground truth, or a list of accepted ones (any of them matches); None never
        matches.

    Numbers compare exactly, as rationals: 18.50 = 18.5 = 37/2, and 0.333 ≠ 1/3. A unit counts only where
    both sides name one (`50%` matches `50`, not `0.5`; `5 cm` does not match `5 m`). Lists and sets match in
    any order, tuples, intervals and matrices element by element with the same brackets. Other expressions
    match when math-verify proves them equal within its time; running out of time is no match. Symmetric,
    safe in threads, never evaluates code, bounded on any input.
    """
    if prediction is None or reference is None:
        return False
    if not isinstance(reference, str):
        return any(answers_match(prediction, accepted) for accepted in reference)
    if not prediction.strip() or not reference.strip():
        return False
    return _same(read_form(prediction), read_form(reference), time.monotonic() + MATCH_SECONDS)
