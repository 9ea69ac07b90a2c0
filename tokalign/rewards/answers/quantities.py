"""Numbers and quantities in maths answers: an exact rational with at most one unit, in any common notation.

`read_number` takes all of a text or none of it: "5 apples" is a quantity, "5 + x" is none. Everything is linear in
the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

DIGITS_CAP = 1_000  # a number with more digits is compared as text (Python refuses int() beyond 4,300)

# -------------------------------------------------------------------------------------------------------
# vocabulary

UNIT_NAMES = {
    "%": "% percent percents percentage pct",
    "dollar": "$ dollar dollars usd buck bucks",
    "cent": "cent cents ¢",
    "euro": "€ euro euros",
    "pound": "£",
    "¥": "¥",
    "yen": "yen",
    "yuan": "yuan",
    "rupee": "₹ rupee rupees",
    "degree": "° degree degrees deg",
    "celsius": "°c °celsius celsius",
    "fahrenheit": "°f °fahrenheit fahrenheit",
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
VAGUE_UNITS = {"¥": {"yen", "yuan"}, "degree": {"celsius", "fahrenheit"}}  # signs of more than one unit
UNITS = {spelling: unit for unit, spellings in UNIT_NAMES.items() for spelling in spellings.split()}
_MULTIPLES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NOT_UNITS = set("sqrt sin cos tan cot sec csc log exp over plus minus times divided frac cdot sum half".split())


# ----------------------------------------------------------------------------------------------------------
# numbers

_SIGN_AND_CURRENCY = re.compile(r"([+-]?) ?([$£€¥₹]?) ?([+-]?) ?")
_MIXED = re.compile(r"(\d++)(?: (\d++) ?/ ?(\d++)| ?\\frac ?(?:\{(\d++)\} ?\{(\d++)\}|(\d)(\d)(?!\d)))")
_FRACTION = re.compile(r"\\frac ?(?:\{ ?([+-]?)(\d++) ?\}|()(\d)) ?(?:\{ ?(\d++) ?\}|(\d))")
_SLASH = re.compile(r"(\d{1,3}(?:,\d{3})++(?!\d)|\d++) ?/ ?(\d++)(?![.\d])")
_DECIMAL = re.compile(r"(\d{1,3}(?:,\d{3})++(?!\d)|\d++)(\.\d*+)?|(\.\d++)")
# 0.1\overline{6}, 0.1\dot6, 0.1(6)
_REPEATING = re.compile(
    r"(\d{0,20})\.(\d{0,40})(?:\\(?:overline|bar|dot) ?(?:\{ ?(\d{1,40}) ?\}|(\d))|\((\d{1,40})\))(?![\d.\\])"
)
_POWER_OF_TEN = re.compile(
    r"(?:[eE]([+-]?\d{1,3})|(?: ?\\times ?| ?\\cdot ?| ?x ?| ?\* ?)10 ?\^ ?"
    r"(?:\{ ?([+-]?\d{1,3}) ?\}|(\d{1,3})))(?![\d.])"
)
_EXPONENT = re.compile(r" ?\^ ?(?:\{(\d)\}|(\d))$")


@dataclass(frozen=True)
class Form:
    """Normal form of an answer."""

    kind: str  # number, digits, base, ratio, word, list, union, one of () [] (] [), matrix, expression
    value: Fraction | str = ""  # the number or the text, empty where there are parts
    parts: tuple[Form, ...] = ()
    unit: str = ""
    name: str = ""  # the x of "x = 3" and of "x > 3", the (x,y) of "(x, y) = (1, 2)"
    text: str = ""  # for the symbolic library: of expressions, and of inequalities beside their intervals


def read_unit(text: str) -> tuple[str, int] | None:
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
    if len(words) == 1 and words[0] in UNITS:
        known = UNITS[words[0]]
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


def read_number(text: str) -> Form | None:
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
        value = _rational(match[2] or match[4] or match[6], "", match[3] or match[5] or match[7])
        whole = _rational(match[1])
        value = value + whole if isinstance(value, Fraction) and isinstance(whole, Fraction) else None
    elif match := _FRACTION.match(text, start):
        value = _rational(match[2] or match[4], "", match[5] or match[6])
        negative ^= match[1] == "-"
    elif match := _SLASH.match(text, start):
        value = _rational(match[1], "", match[2])
    elif match := _REPEATING.match(text, start):
        first, period = match[1] + match[2], match[3] or match[4] or match[5]
        whole_shift = 10 ** len(match[2])
        value = Fraction(int(first + period) - int(first or "0"), whole_shift * (10 ** len(period) - 1))
    elif match := _DECIMAL.match(text, start):
        value = _rational(match[1] or "", match[2] or match[3] or "")
    else:
        return None
    end = match.end()
    if isinstance(value, Fraction) and (power := _POWER_OF_TEN.match(text, end)):
        value *= Fraction(10) ** int(power[1] or power[2] or power[3])
        end = power.end()
    # All of the text must have been read: "5 apples" is a quantity, "5 + x" is none.
    unit = read_unit(text[end:]) if len(text) - end <= 200 else None
    if value is None or unit is None:
        return None
    name = unit[0] or UNITS.get(head[2], "")
    if isinstance(value, str):
        return Form("digits", "-" + value if negative else value, unit=name) if unit[1] == 1 else None
    return Form("number", (-value if negative else value) * unit[1], unit=name)


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
