"""Normal forms of maths answers: what `answers_match` compares and `extract_answer` prints.

A form is a number (an exact rational), digits in a base, a word, or a list, tuple, interval, union or matrix
of further forms; what is none of these is an expression and keeps its LaTeX. `notation.py` has spelled the
text plainly before. Everything here is linear in the text, up to the caps below.
"""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from math import gcd, lcm

from tokalign.rewards.answers.notation import plain_notation
from tokalign.rewards.answers.quantities import UNIT_NAMES, UNITS, Form, read_number, read_unit

ANSWER_CAP = 2_000  # a longer answer that is not a number matches only the same text
LIST_CAP = 64  # elements of a list, tuple or matrix
DEPTH_CAP = 8  # brackets in brackets

_INFIX_SPACE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")  # spaces that separate neither words nor numbers
_BASE = re.compile(r"([0-9A-F]{1,200}) ?_ ?\{? ?(\d{1,2}) ?\}?|([0-9A-F]{1,200}) (?:in )?base (\d{1,2})")
_WORD = re.compile(r"[^\W\d_]++(?:[ '-]{1,2}[^\W\d_]++)*+\.?")
_CHOICE = re.compile(r"\(? ?([A-Z]) ?\)?\.?")
_SUBSCRIPT = r"(?:_\{?[A-Za-z0-9]{1,9}\}?)?"
_GREEK = r"\\(?:alpha|beta|gamma|delta|theta|lambda|mu|rho|sigma|phi|omega)(?![a-z]) ?"
_VARIABLE = rf"(?:[A-Za-z]|{_GREEK}){_SUBSCRIPT}"
_NAME = re.compile(rf"{_VARIABLE}(?: ?\([a-z]\))?")
_ASSIGNMENT = re.compile(
    rf"({_NAME.pattern}|\( ?{_VARIABLE}(?: ?, ?{_VARIABLE}){{1,5}} ?\)) ?(?:=|\\in(?![a-z])) ?(?=\S)([^=<>]++)"
)
_REVERSED = re.compile(rf"([^=<>]++)= ?({_NAME.pattern})")  # "3 = x"
_ORDER = re.compile(r"<|>|\\leq |\\geq |\\neq ")
_FLIPPED = {"<": ">", ">": "<", r"\leq ": r"\geq ", r"\geq ": r"\leq ", r"\neq ": r"\neq "}
_TERM = r"(0|[1-9]\d{0,19}(?:\.\d{1,19})?)"  # no leading zero: 5:05 is a time
_RATIO = re.compile(rf"{_TERM}(?: ?(?::|\\colon) ?{_TERM}){{1,9}}")
_REAL_NUMBERS = (
    r"(?:\\mathbb ?(?:\{ ?R ?\}|R)|\\R|\\Reals|(?i:(?:the )?(?:set of )?(?:all )?(?:the )?real(?:s| numbers)))"
)
_REALS = re.compile(rf"{_REAL_NUMBERS}(?: ?(?:\\setminus|\\backslash|-|\\) ?\\\{{(.{{1,200}})\\\}})?")
_NOTHING = re.compile(r"\\emptyset|\\\{ ?\\\}|(?i:no solutions?|(?:the )?empty set)")
_SET_BUILDER = re.compile(rf"\\\{{ ?({_VARIABLE}) ?(?:\\in ?{_REAL_NUMBERS} ?)?(?:\||:|\\mid|\\vert) ?(.*)\\\}}")
_MATRIX = re.compile(
    r"([(\[|]?) ?\\begin ?\{(?:(array)\} ?\{[^{}]{0,40}|([pbvB]?matrix))\}(.*)\\end ?\{(?:array|\3)\} ?([)\]|]?)",
    re.DOTALL,
)
_COMMAND = re.compile(r"\\[A-Za-z]+")
_INFINITIES = (r"\infty", r"-\infty")
_INFINITE = tuple(Form("expression", end, text=end) for end in _INFINITIES)

_START = re.compile(r"\A(?:\s|\\[,;:! ]|\\q?quad(?![A-Za-z])|~)++")
_END = re.compile(r"(?<!\\)(?:\s|\\[,;:! ]|\\q?quad|[~.,;:!]|\\\Z)++\Z")
_END_CAP = 40  # characters in which a pattern may look for the end


def unwrap(text: str) -> str:
    """Take off what only surrounds an answer: math delimiters, boxes, emphasis, outer braces, final punctuation."""
    # Wrappers stand in each other in any order (`**$\\boxed{7}$.**`), so peel until nothing changes.
    for _ in range(DEPTH_CAP):
        before = text
        text = _START.sub("", text.strip()).strip("*`")
        # An exclamation mark at the end may be a factorial, which is no punctuation; `\!` is a space.
        if "!" not in text[-2:] or text.endswith("\\!"):
            text = text[:-_END_CAP] + _END.sub("", text[-_END_CAP:])
        for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]"), ("$$", "$$"), ("$", "$")):
            if len(text) > len(opening + closing) and text.startswith(opening) and text.endswith(closing):
                text = text[len(opening) : -len(closing)]
                break
        if (box := re.match(r"\\(?:f?boxed|fbox|underline) ?(?=\{)", text)) and _spans(text[box.end() :]):
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
    if form := read_number(text):
        return form
    if len(text) > ANSWER_CAP:
        return Form("text", " ".join(text.split()))
    if match := _BASE.fullmatch(text):
        return Form("base", f"{(match[1] or match[3]).lstrip('0')}_{int(match[2] or match[4])}")
    if _RATIO.fullmatch(text) and (form := _ratio(text)):
        return form
    if match := _CHOICE.fullmatch(text):
        return Form("word", match[1])
    if _NOTHING.fullmatch(text):
        return Form("word", r"\emptyset")
    if match := _REALS.fullmatch(text):
        left_out = [read_number(part) for part in _split(match[1] or "", (",",)) if part.strip()]
        points = [point for point in left_out if point and point.kind == "number"]
        if len(points) == len(left_out) <= LIST_CAP:
            return _all_but(points)
    if sum(map(str.isalpha, text)) > 2 and _WORD.fullmatch(text):
        return Form("word", re.sub(r"[ '-]", "", text).casefold())
    if depth < DEPTH_CAP and (form := _composite(text, depth)):
        return form
    return _expression(text)


def _composite(text: str, depth: int) -> Form | None:
    """A form with parts, or None. Every branch looks at the outermost structure only and reads the parts again."""
    # The name first: in "x = (1, 2)" it belongs to the whole. Then a matrix, whose cells may hold commas. Then the
    # separators that bind least, so that "(1, 2), (3, 4)" is a list of two pairs and not one long pair.
    if match := _ASSIGNMENT.fullmatch(text) or _REVERSED.fullmatch(text):
        name, value = match.groups() if match.re is _ASSIGNMENT else reversed(match.groups())
        inner = _form(value, depth + 1)
        if not inner.name:
            return replace(inner, name=name.replace(" ", ""))
    if match := _SET_BUILDER.fullmatch(text):
        inner = _form(match[2], depth + 1)
        return inner if inner.parts and _names(inner) == {match[1].replace(" ", "")} else None
    if (match := _MATRIX.fullmatch(text)) and (match[3] or match[1]) and bool(match[1]) == bool(match[5]):
        rows = [_split(row, ("&",)) for row in _rows(match[4]) if row.strip()]
        cells = _elements([cell for row in rows for cell in row], depth, flatten=False)
        if cells and len({len(row) for row in rows}) == 1:
            kind = "determinant" if match[3] == "vmatrix" or match[1] == "|" else "matrix"
            return Form(f"{kind} of {len(rows)} rows", parts=cells)
        return None
    if len(parts := _split(text, (r"\cup",))) > 1:
        forms = _elements(parts, depth, flatten=False)
        return Form("union", parts=forms) if forms else None
    if len(parts := _split(text, (r"\land",))) > 1:
        forms = _elements(parts, depth, flatten=False)
        return (_between(*forms) if len(forms) == 2 else None) or Form("list", parts=forms) if forms else None
    if len(parts := _split(text, (",", ";"))) > 1:
        parts = [part for part in parts if part.strip()]  # "1, 2, and 3" leaves an empty one
        forms = _elements(parts, depth, flatten=True)
        # Inequalities of one variable side by side are the pieces of one set.
        pieces = forms and all(form.text and form.parts for form in forms) and len({form.name for form in forms}) == 1
        return Form("union" if pieces else "list", parts=forms) if forms else None
    if form := _inequality(text, depth):
        return form
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


def _ratio(text: str) -> Form | None:
    """`6:4` as 3/2, and `2:4:6` as 1:2:3 in smallest whole numbers."""
    terms = [Fraction(term.strip()) for term in re.split(r":|\\colon", text)]
    if len(terms) == 2:
        return Form("ratio", terms[0] / terms[1]) if terms[1] else None
    scale = Fraction(lcm(*(term.denominator for term in terms)), gcd(*(term.numerator for term in terms)) or 1)
    return Form("ratio", ":".join(str(term * scale) for term in terms))


def _names(form: Form) -> set[str]:
    return {form.name} if form.name else {part.name for part in form.parts}


def _all_but(points: list[Form], name: str = "", text: str = "") -> Form:
    """The real numbers without some: the intervals between them."""
    ends = [_INFINITE[1], *sorted(points, key=lambda point: point.value), _INFINITE[0]]
    intervals = tuple(Form("()", parts=pair, name=name) for pair in pairwise(ends))
    return Form("union", parts=intervals, text=text) if points else intervals[0]


def _inequality(text: str, depth: int) -> Form | None:
    r"""`x > 5`, `1 \leq x < 3`, `x \neq 2`, between a variable and constants, as the interval or union that it says."""
    signs = _ORDER.findall(text)
    sides = [side.strip() for side in _ORDER.split(text)]
    if not 1 <= len(signs) <= 2:
        return None
    # Turn it so that the variable stands on the left of one sign, or between two that read upwards.
    turned = _NAME.fullmatch(sides[0]) is None if len(signs) == 1 else signs[0] in (">", r"\geq ")
    if turned:
        sides, signs = sides[::-1], [_FLIPPED[sign] for sign in signs[::-1]]
    name, *bounds = sides if len(signs) == 1 else (sides[1], sides[0], sides[2])
    if not _NAME.fullmatch(name) or not all(_is_constant(bound) for bound in bounds):
        return None
    ends = [_form(bound, depth + 1) for bound in bounds]
    name = name.replace(" ", "")
    if len(signs) == 2:
        return _interval(ends, signs, name, text) if {*signs} <= {"<", r"\leq "} else None
    if signs == [r"\neq "]:
        return _all_but(ends, name, text) if ends[0].kind == "number" else None
    if signs[0] in ("<", r"\leq "):
        return _interval([_INFINITE[1], *ends], ["<", *signs], name, text)
    return _interval([*ends, _INFINITE[0]], [_FLIPPED[signs[0]], "<"], name, text)


def _is_constant(text: str) -> bool:
    return bool(text) and (read_number(text) is not None or not re.search(r"[^\W\d_]", _COMMAND.sub("", text)))


def _interval(ends: list[Form], signs: list[str], name: str, text: str) -> Form:
    closed = [sign == r"\leq " and end.value not in _INFINITIES for sign, end in zip(signs, ends, strict=True)]
    return Form("(["[closed[0]] + ")]"[closed[1]], parts=tuple(ends), name=name, text=text)


def _between(first: Form, second: Form) -> Form | None:
    r"""What two inequalities leave together, "x > 1 and x \leq 3": the interval from one to the other."""
    lower, upper = (first, second) if first.parts[-1:] == _INFINITE[:1] else (second, first)
    if not (lower.text and upper.text and lower.name == upper.name):
        return None
    if lower.parts[1:] != _INFINITE[:1] or upper.parts[:1] != _INFINITE[1:]:
        return None
    ends = (lower.parts[0], upper.parts[1])
    if any(end.kind != "number" for end in ends) or ends[0].value >= ends[1].value:  # type: ignore[operator]
        return None
    return Form(lower.kind[0] + upper.kind[1], parts=ends, name=lower.name, text=f"{lower.text} \\land {upper.text}")


def _expression(text: str) -> Form:
    unit = ""
    if text.endswith(("°", "%")):
        text, unit = text[:-1].rstrip(), UNITS[text[-1]]
    else:
        rest, _, last = text.rpartition(" ")
        named = read_unit(" " + last) if rest and last[:1].isalpha() else None
        if named and named[0].split("^")[0] in UNIT_NAMES and len(last.split("^")[0]) > 1:
            text, unit = rest, named[0]
    return Form("expression", _INFIX_SPACE.sub("", text), unit=unit, text=text)


def read_form(answer: str) -> Form:
    """The normal form of a final answer written in plain text or LaTeX."""
    return _cached_form(answer) if len(answer) <= ANSWER_CAP else _read(answer)


def _read(answer: str) -> Form:
    return _form(plain_notation(answer))


_cached_form = lru_cache(maxsize=8_192)(_read)  # a reference is read once for all of its rollouts
