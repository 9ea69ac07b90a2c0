"""Normal forms of maths answers: what `answers_match` compares and `extract_answer` prints.

A form is a number (an exact rational), digits in a base, a word, or a list, tuple, interval, union or matrix
of further forms; what is none of these is an expression and keeps its LaTeX. Everything here is linear in
the text, up to the caps below.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

ANSWER_CAP = 2_000  # a longer answer that is not a number matches only the same text
DIGITS_CAP = 1_000  # a number with more digits is compared as text (Python refuses int() beyond 4,300)
LIST_CAP = 64  # elements of a list, tuple or matrix
DEPTH_CAP = 8  # brackets in brackets

# -------------------------------------------------------------------------------------------------------
# vocabulary

UNIT_NAMES = {
    "%": "% percent percents percentage pct",
    "dollar": "$ dollar dollars usd buck bucks",
    "cent": "cent cents ¢",
    "euro": "€ euro euros",
    "pound": "£",
    "degree": "° degree degrees deg",
    "mm": "mm millimeter millimeters millimetre millimetres",
    "cm": "cm centimeter centimeters centimetre centimetres",
    "m": "m meter meters metre metres",
    "km": "km kilometer kilometers kilometre kilometres",
    "inch": "in inch inches",
    "foot": "ft foot feet",
    "yard": "yd yard yards",
    "mile": "mi mile miles",
    "g": "g gram grams",
    "kg": "kg kilogram kilograms",
    "mg": "mg milligram milligrams",
    "ounce": "oz ounce ounces",
    "lb": "lb lbs",
    "litre": "l liter liters litre litres",
    "ml": "ml milliliter milliliters millilitre millilitres",
    "second": "s sec secs second seconds",
    "minute": "min mins minute minutes",
    "hour": "h hr hrs hour hours",
    "mph": "mph",
}
_UNITS = {spelling: unit for unit, spellings in UNIT_NAMES.items() for spelling in spellings.split()}
_MULTIPLES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NOT_UNITS = set("sqrt sin cos tan cot sec csc log exp over plus minus times divided frac cdot sum half".split())

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−–‐‑", "-"),
        **dict.fromkeys("\u00a0\u2009\u202f\t\r\n", " "),
        "×": r"\times ",
        "·": r"\cdot ",
        "÷": "/",
        "π": r"\pi ",
        "∞": r"\infty ",
        "∪": r"\cup ",
        "±": r"\pm ",
        "°": r"^\circ",
        "²": "^2",
        "³": "^3",
        "％": "%",
    }
)
# Every pattern is linear: no quantifier inside a quantifier over the same characters, no unbounded look-
# ahead.
_REWRITES = [
    (re.compile(r"(?<=\d)(?:\{,\}|,\\!)(?=\d{3})"), ""),  # LaTeX thousands separators are never list commas
    (re.compile(r"\\(?:left|right|displaystyle|textstyle|bigl|bigr|Bigl|Bigr)(?![A-Za-z])"), ""),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|mathbf)\s?\{([^{}]{0,200})\}"), r" \1 "),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\\(?:[,;: ]|quad|qquad)|~"), " "),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\^\s?\{\s?\\circ\s?\}|\^\s?\\circ(?![A-Za-z])|\\degree(?![A-Za-z])"), "°"),
    (re.compile(r"\\infin(?![A-Za-z])|(?<![A-Za-z\\])(?:infinity|infty|inf)(?![A-Za-z])"), r"\\infty "),
    (re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<![A-Za-z\\])sqrt\s?\(([^()]{0,200})\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])"), ","),
    (re.compile(r"\s++"), " "),
]
_INFIX_SPACE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")  # spaces that separate neither words nor numbers

# ----------------------------------------------------------------------------------------------------------
# numbers

_SIGN_AND_CURRENCY = re.compile(r"([+-]?) ?([$£€]?) ?([+-]?) ?")
_MIXED = re.compile(r"(\d++)(?: (\d++) ?/ ?(\d++)| ?\\frac ?\{(\d++)\} ?\{(\d++)\})")
_FRACTION = re.compile(r"\\frac ?(?:\{ ?([+-]?)(\d++) ?\}|()(\d)) ?(?:\{ ?(\d++) ?\}|(\d))")
_SLASH = re.compile(r"(\d{1,3}(?:,\d{3})++(?!\d)|\d++) ?/ ?(\d++)(?![.\d])")
_DECIMAL = re.compile(r"(\d{1,3}(?:,\d{3})++(?!\d)|\d++)(\.\d*+)?|(\.\d++)")
_POWER_OF_TEN = re.compile(
    r"(?:[eE]([+-]?\d{1,3})|(?: ?\\times ?| ?\\cdot ?| ?x ?| ?\* ?)10 ?\^ ?(?:\{ ?([+-]?\d{1,3}) ?\}|(\d)))(?![\d.])"
)
_EXPONENT = re.compile(r" ?\^ ?(?:\{(\d)\}|(\d))$")


@dataclass(frozen=True)
class Form:
    """Normal form of an answer."""

    kind: str  # number, digits, base, word, list, union, one of () [] (] [), matrix, expression
    value: Fraction | str = ""  # the number or the text, empty where there are parts
    parts: tuple[Form, ...] = ()
    unit: str = ""
    name: str = ""  # the x of "x = 3"
    text: str = ""  # for the symbolic library


def _unit(text: str) -> tuple[str, int] | None:
    """Unit and multiplier that follow a number ("" if none), None if the rest of the text is not a unit."""
    spaced, text = text.startswith(" "), text.strip().rstrip(".").rstrip()
    if not text:
        return "", 1
    power = ""
    if exponent := _EXPONENT.search(text[-8:]):
        power = "^" + (exponent[1] or exponent[2])
        text = text[: len(text) - len(exponent[0])]
    words = text.lower().split(" ")
    if len(words) > 1 and words[0] in ("square", "cubic"):
        power, words = "^2" if words[0] == "square" else "^3", words[1:]
    multiple = _MULTIPLES.get(words[0], 1)
    if multiple > 1:
        words = words[1:]
    if not words:
        return "", multiple
    if len(words) == 1 and words[0] in _UNITS:
        known = _UNITS[words[0]]
        # "5m" and "3x" are products; "5 m", "5%", "5cm" are quantities
        return (known + power, multiple) if spaced or len(words[0]) > 1 or not words[0].isalpha() else None
    letters = all(word.replace("-", "").replace("'", "").replace("/", "").isalpha() for word in words)
    if not spaced or len(words) > 20 or not letters or _NOT_UNITS & set(words):
        return None
    if len(words) == 1 and len(words[0]) < 3:
        return None
    return " ".join(word.removesuffix("s") for word in words) + power, multiple


def _rational(integer: str, decimals: str = "", denominator: str = "1") -> Fraction | str | None:
    """The exact value, or its canonical digits when there are too many of them; None for a zero denominator."""
    integer, decimals = integer.replace(",", "").lstrip("0"), decimals.lstrip(".").rstrip("0")
    denominator = denominator.lstrip("0")
    if not denominator:
        return None
    if len(integer) + len(decimals) + len(denominator) > DIGITS_CAP:
        return f"{integer}.{decimals}/{denominator}"
    return Fraction(int((integer + decimals) or "0"), int(denominator) * 10 ** len(decimals))


def _number(text: str) -> Form | None:
    """Read `text`, all of it, as one number with an optional currency, power of ten and unit."""
    # The sign stands before the currency or behind it (-$5, $-5); with both there is no number.
    head = _SIGN_AND_CURRENCY.match(text)
    assert head is not None  # every part is optional
    start, negative = head.end(), "-" in (head[1], head[3])
    if head[1] and head[3]:
        return None
    value: Fraction | str | None
    # From the longest reading to the shortest: "1 3/4" begins with the number 1, and "6/8" with the number 6.
    if match := _MIXED.match(text, start):
        value = _rational(match[2] or match[4], "", match[3] or match[5])
        whole = _rational(match[1])
        value = value + whole if isinstance(value, Fraction) and isinstance(whole, Fraction) else None
    elif match := _FRACTION.match(text, start):
        value = _rational(match[2] or match[4], "", match[5] or match[6])
        negative ^= match[1] == "-"
    elif match := _SLASH.match(text, start):
        value = _rational(match[1], "", match[2])
    elif match := _DECIMAL.match(text, start):
        value = _rational(match[1] or "", match[2] or match[3] or "")
    else:
        return None
    end = match.end()
    if isinstance(value, Fraction) and (power := _POWER_OF_TEN.match(text, end)):
        value *= Fraction(10) ** int(power[1] or power[2] or power[3])
        end = power.end()
    # All of the text must have been read: "5 apples" is a quantity, "5 + x" is none.
    unit = _unit(text[end:]) if len(text) - end <= 200 else None
    if value is None or unit is None:
        return None
    name = unit[0] or {"$": "dollar", "£": "pound", "€": "euro"}.get(head[2], "")
    if isinstance(value, str):
        return Form("digits", "-" + value if negative else value, unit=name) if unit[1] == 1 else None
    return Form("number", (-value if negative else value) * unit[1], unit=name)


# -----------------------------------------------------------------------------------------------------
# normal forms

_BASE = re.compile(r"([0-9A-F]{1,200}) ?_ ?\{? ?(\d{1,2}) ?\}?|([0-9A-F]{1,200}) (?:in )?base (\d{1,2})")
_WORD = re.compile(r"[A-Za-z]++(?:[ '-]{1,2}[A-Za-z]++)*+\.?")
_CHOICE = re.compile(r"\(? ?([A-Z]) ?\)?\.?")
_ASSIGNMENT = re.compile(
    r"([A-Za-z](?:_\{?[A-Za-z0-9]{1,9}\}?)?(?: ?\([a-z]\))?) ?(?:=|\\in(?![a-z])|∈) ?(?=\S)([^=<>]++)"
)
_MATRIX = re.compile(r"\\begin ?\{([pbvB]?matrix)\}(.*)\\end ?\{\1\}", re.DOTALL)


def unwrap(text: str) -> str:
    """Take off what only surrounds an answer: math delimiters, boxes, emphasis, outer braces, final punctuation."""
    # Wrappers stand in each other in any order (`**$\\boxed{7}$.**`), so peel until nothing changes.
    for _ in range(DEPTH_CAP):
        before = text
        # An exclamation mark at the end may be a factorial, which is no punctuation.
        text = text.strip().strip("*`").rstrip(".,;:!").strip() if "!" not in text[-2:] else text.strip()
        for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]"), ("$$", "$$"), ("$", "$")):
            if len(text) > len(opening + closing) and text.startswith(opening) and text.endswith(closing):
                text = text[len(opening) : -len(closing)]
                break
        if (box := re.match(r"\\f?boxed ?(?=\{)|\\fbox ?(?=\{)", text)) and _spans(text[box.end() :]):
            text = text[box.end() :]
        if text.startswith("{") and _spans(text):
            text = text[1:-1]
        if text == before:
            break
    return text


def _spans(text: str) -> bool:
    """Whether the bracket that opens `text` closes at its end (`(a)(b)` does not)."""
    depth = 0
    escaped = False
    for index, character in enumerate(text):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth == 0:
                return index == len(text) - 1
    return False


def _split(text: str, separators: tuple[str, ...]) -> list[str]:
    r"""Split at separators outside all brackets, `\{ \}` included. Linear in the text."""
    parts, start, depth, index = [], 0, 0, 0
    while index < len(text):
        if depth == 0 and (separator := next((s for s in separators if text.startswith(s, index)), None)):
            parts.append(text[start:index])
            index += len(separator)
            start = index
            continue
        if text[index] == "\\" and text[index + 1 : index + 2] not in ("{", "}"):
            index += 1  # the backslash; its letter follows
            continue
        if text[index] in "([{":
            depth += 1
        elif text[index] in ")]}":
            depth = max(0, depth - 1)
        index += 1
    return [*parts, text[start:]]


def _rows(body: str) -> list[str]:
    r"""Rows of a matrix: `\\`, or the single backslash before a digit or sign that MATH-500's files are left with."""
    return re.split(r"\\\\(?:\[[^\]]{0,20}\])?|\\cr(?![a-z])|\\(?=[-\d ])", body)


def _elements(parts: list[str], depth: int, *, flatten: bool) -> tuple[Form, ...] | None:
    if len(parts) > LIST_CAP or not all(part.strip() for part in parts):
        return None
    forms = [_form(part, depth + 1) for part in parts]
    if not flatten:
        return tuple(forms)
    return tuple(inner for form in forms for inner in (form.parts if form.kind == "list" else (form,)))


def _form(text: str, depth: int = 0) -> Form:
    # The order decides what an ambiguous text is. Numbers first, for a comma or slash in one separates nothing; then
    # what a single pattern tells; structure last, because it reads its parts by this same function.
    text = unwrap(text)
    if form := _number(text):
        return form
    if len(text) > ANSWER_CAP:
        return Form("text", " ".join(text.split()))
    if match := _BASE.fullmatch(text):
        return Form("base", f"{(match[1] or match[3]).lstrip('0')}_{int(match[2] or match[4])}")
    if match := _CHOICE.fullmatch(text):
        return Form("word", match[1])
    if sum(map(str.isalpha, text)) > 2 and _WORD.fullmatch(text):
        return Form("word", re.sub(r"[ '-]", "", text).casefold())
    if depth < DEPTH_CAP and (form := _composite(text, depth)):
        return form
    return _expression(text)


def _composite(text: str, depth: int) -> Form | None:
    """A form with parts, or None. Every branch looks at the outermost structure only and reads the parts again."""
    # The name first: in "x = (1, 2)" it belongs to the whole. Then a matrix, whose cells may hold commas. Then the
    # separators that bind least, so that "(1, 2), (3, 4)" is a list of two pairs and not one long pair.
    if match := _ASSIGNMENT.fullmatch(text):
        inner = _form(match[2], depth + 1)
        if not inner.name:
            return replace(inner, name=match[1].replace(" ", ""))
    if match := _MATRIX.fullmatch(text):
        rows = [_split(row, ("&",)) for row in _rows(match[2]) if row.strip()]
        cells = _elements([cell for row in rows for cell in row], depth, flatten=False)
        if cells and len({len(row) for row in rows}) == 1:
            kind = "determinant" if match[1] == "vmatrix" else "matrix"
            return Form(f"{kind} of {len(rows)} rows", parts=cells)
        return None
    if len(parts := _split(text, (r"\cup",))) > 1:
        forms = _elements(parts, depth, flatten=False)
        return Form("union", parts=forms) if forms else None
    if len(parts := _split(text, (",", ";"))) > 1:
        parts = [part for part in parts if part.strip()]  # "1, 2, and 3" leaves an empty one
        forms = _elements(parts, depth, flatten=True)
        return Form("list", parts=forms) if forms else None
    if text.startswith(r"\{") and text.endswith(r"\}") and len(text) > 4:
        forms = _elements(_split(text[2:-2], (",", ";")), depth, flatten=True)
        return Form("list", parts=forms) if forms else None
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and len(text) > 2 and _spans(text):
        parts = _split(text[1:-1], (",", ";"))
        if len(parts) > 1:
            forms = _elements(parts, depth, flatten=False)
            return Form(text[0] + text[-1], parts=forms) if forms else None
        return _form(parts[0], depth + 1) if text[0] + text[-1] == "()" else None
    if r"\pm" in text and "," not in text:
        both = [text.replace(r"\pm", "+").replace(r"\mp", "-"), text.replace(r"\pm", "-").replace(r"\mp", "+")]
        forms = _elements([one.strip().removeprefix("+") for one in both], depth, flatten=True)
        return Form("list", parts=forms) if forms else None
    return None


def _expression(text: str) -> Form:
    unit = ""
    if text.endswith(("°", "%")):
        text, unit = text[:-1].rstrip(), _UNITS[text[-1]]
    else:
        rest, _, last = text.rpartition(" ")
        named = _unit(" " + last) if rest and last[:1].isalpha() else None
        if named and named[0].split("^")[0] in UNIT_NAMES and len(last.split("^")[0]) > 1:
            text, unit = rest, named[0]
    return Form("expression", _INFIX_SPACE.sub("", text), unit=unit, text=text)


def read_form(answer: str) -> Form:
    """The normal form of a final answer written in plain text or LaTeX."""
    return _cached_form(answer) if len(answer) <= ANSWER_CAP else _read(answer)


def _read(answer: str) -> Form:
    text = answer.translate(_CHARACTERS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return _form(text)


_cached_form = lru_cache(maxsize=8_192)(_read)  # a reference is read once for all of its rollouts


def plain_number(form: Form, *, fraction: bool) -> str:
    """A number form without currency, separators, unit and trailing zeros; `-3/4` if `fraction`, else `-0.75`."""
    value = form.value
    assert isinstance(value, Fraction)
    places = 0
    while 10**places % value.denominator and places <= DIGITS_CAP and not fraction:
        places += 1
    if value.denominator == 1 or 10**places % value.denominator:
        return str(value)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"
