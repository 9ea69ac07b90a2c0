r"""One plain spelling of a maths answer: its characters, LaTeX commands and spoken words, before `forms.py` reads it.

Only what is the same mathematics in every place is rewritten here: `√2` is `\sqrt{2}`, `½` is `\frac{1}{2}`, `x ≤ 3`
is `x\leq 3`, `x**2` is `x^2`. Every pattern is linear: no quantifier inside a quantifier over the same characters, no
unbounded look-ahead.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_ROOTS = {"√": r"\sqrt", "sqrt": r"\sqrt", "∛": r"\sqrt[3]", "cbrt": r"\sqrt[3]", "∜": r"\sqrt[4]"}
_ROOT_DEPTH = 8  # roots of roots in round brackets


def _vulgar(code: int) -> str:
    value = Fraction(unicodedata.numeric(chr(code))).limit_denominator(10)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−–‐‑", "-"),
        **dict.fromkeys("\u00a0\u2009\u202f\t\r\n", " "),
        **dict.fromkeys("\u200b\u2060\ufeff", ""),
        **dict.fromkeys("÷⁄∕", "/"),
        **dict.fromkeys("·⋅∙", r"\cdot "),
        **dict.fromkeys("°º", r"^\circ "),
        **dict.fromkeys("≤⩽≦", r"\leq "),
        **dict.fromkeys("≥⩾≧", r"\geq "),
        **dict.fromkeys("∪⋃", r"\cup "),
        **{chr(code): _vulgar(code) for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F))},
        "×": r"\times ",
        "∗": "*",
        "π": r"\pi ",
        "∞": r"\infty ",
        "±": r"\pm ",
        "≠": r"\neq ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "ℝ": r"\mathbb{R}",
        "∨": r"\lor ",
        "∧": r"\land ",
        "、": ",",
    }
)
_SCRIPT = re.compile("([⁰¹²³⁴-⁹⁺⁻ⁿ]+)|[₀-₉ₙ]+")
_GREEK = dict(zip("αβγδθλμρσφω", "alpha beta gamma delta theta lambda mu rho sigma phi omega".split(), strict=True))
_GREEK_SYMBOL = re.compile(f"(?<![Ͱ-Ͽ])[{''.join(_GREEK)}](?![Ͱ-Ͽ])")  # alone; several are a word
_DIGIT_GROUPS = re.compile(r"(?<![\d.^_])\d{1,3}(?:(?:\\[,;: ]|~|[\u00a0\u2009\u202f])\d{3})+(?!\d)")  # 58\,500
_ROOT = re.compile(r"(√|∛|∜|(?<![A-Za-z\\])(?:sqrt|cbrt)(?![A-Za-z])) ?(\d+(?:\.\d+)?)?")
_ROOT_OF_BRACKET = re.compile(r"(\\sqrt(?:\[\d\])?) ?\(([^()]{0,200})\)")
_CUT_OFF = re.compile(r"(?<![\d.])(\d{0,20})\.(\d{3,40})(?:\.\.\.|\\[lc]?dots(?![a-z]))")  # 0.333...

# commands that change the type and not the meaning
_STYLES = "text(?:bf|it|rm|sf|tt|normal)?|mbox|emph|math(?:rm|bf|it|sf|tt|normal)|boldsymbol|bm|pmb"
_REWRITES = [
    (re.compile(r"(?<=\d)(?:\{,\}|,\\! ?)(?=\d{3})"), ""),  # LaTeX thousands separators are never list commas
    (re.compile(r"\\(?:left|right|displaystyle|textstyle|limits|[bB]igg?[lrm]?)(?![A-Za-z])"), ""),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(rf"\\(?:{_STYLES})\s?\{{([^{{}}]{{0,200}})\}}"), r" \1 "),
    (re.compile(rf"\\(?:{_STYLES})\s?(?=\{{)|\\(?:bf|rm|it|sf|tt)(?![A-Za-z])"), ""),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\\(?:[,;: ]|quad|qquad)|~"), " "),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\^\s?\{\s?\\circ\s?\}|\^\s?\\circ(?![A-Za-z])|\\degree(?![A-Za-z])"), "°"),
    (re.compile(r"(?:°|(?<![A-Za-z])(?i:degrees?)) ?([CF]|(?i:celsius|fahrenheit))(?![A-Za-z])"), r"°\1"),
    (re.compile(r"\\infin(?![A-Za-z])|(?<![A-Za-z\\])(?:infinity|infty|inf|oo)(?![A-Za-z])"), r"\\infty "),
    (re.compile(r"(?<![\w)}\]] )(?<![\w)}\]])\+ ?(?=\\infty)"), ""),
    (re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset "),
    (re.compile(r"<=|\\leq?(?:slant)?(?![A-Za-z])"), r"\\leq "),
    (re.compile(r">=|\\geq?(?:slant)?(?![A-Za-z])"), r"\\geq "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\not ?=|\\neq?(?![A-Za-z])|(?<= )!="), r"\\neq "),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"(?<=[\])}]) ?U ?(?=[\[({\\])"), r"\\cup "),  # "(0,1) U (2,3)"
    (re.compile(r"(?<=[\w)}])( ?)\*\*\1(-?\d{1,9}(?![\d.eE]))"), r"^{\2}"),  # powers as programs write them, never bold
    (re.compile(r"(?<=[\w)}])( ?)\*\*\1(?=[A-Za-z({])"), "^"),
    (re.compile(r"\^ ?(?:-(\d{1,9})(?![\d.])|\( ?-(\d{1,9}) ?\))"), r"^{-\1\2}"),
    (re.compile(r"\{([^{}]{0,200})\\over(?![A-Za-z])([^{}]{0,200})\}"), r"\\frac{\1}{\2}"),
    # x_{1} is x_1; but 2^{1}0 is not 2^10
    (re.compile(r"([_^])\{ ?([0-9A-Za-z]) ?\}(?![0-9A-Za-z])"), r"\1\2"),
    (re.compile(r"\s++"), " "),
]
_OR = re.compile(r"(?<![A-Za-z\\])or(?![A-Za-z])|\\(?:lor|vee)(?![A-Za-z])")
_AND = re.compile(r"(?<![A-Za-z\\])and(?![A-Za-z])|\\(?:land|wedge)(?![A-Za-z])")
_ORDER = re.compile(r"[<>]|\\[lgn]eq ")


def _period(match: re.Match[str]) -> str:
    r"""`0.1666...` as `0.1\overline{6}`: the shortest block that ends the digits twice, over three digits or more."""
    whole, digits = match[1], match[2]
    for length in range(1, len(digits) // 2 + 1):
        block = digits[-length:]
        start = len(digits)
        while digits.endswith(block, 0, start):
            start -= length
        if len(digits) - start >= max(3, 2 * length):
            return rf"{whole}.{digits[:start]}\overline{{{block}}}"
    return match[0]


def plain_notation(answer: str) -> str:
    """The same answer in one spelling; time linear in its length."""
    text = _DIGIT_GROUPS.sub(lambda number: re.sub(r"\D", "", number[0]), answer)
    if not text.isascii():
        text = _SCRIPT.sub(lambda script: f"{'^' if script[1] else '_'}{{{_normal(script[0])}}}", text)
        text = _GREEK_SYMBOL.sub(lambda letter: f"\\{_GREEK[letter[0]]} ", text)
        # Full-width and mathematical letters and digits; after the table, for `²` would become 2 and `ℝ` R.
        text = _normal(text.translate(_CHARACTERS))
    text = _CUT_OFF.sub(_period, text)
    text = _ROOT.sub(lambda root: _ROOTS[root[1]] + (f"{{{root[2]}}}" if root[2] else ""), text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    for _ in range(_ROOT_DEPTH if "sqrt" in text else 0):
        text, changed = _ROOT_OF_BRACKET.subn(r"\1{\2}", text)
        if not changed:
            break
    # Between inequalities "or" joins sets and "and" cuts them; anywhere else both separate the answers of a list.
    compared = _ORDER.search(text)
    return _AND.sub(r"\\land " if compared else ",", _OR.sub(r"\\cup " if compared else ",", text))


def _normal(text: str) -> str:
    return unicodedata.normalize("NFKC", text).translate(_CHARACTERS)
