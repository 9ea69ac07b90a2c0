r"""The final answer that a completion states: after `####`, in `\boxed{…}`, after "the answer is", in a tag or JSON.

Conventions: `docs/answers.md`. Data: GSM8K (Cobbe et al. 2021, arXiv 2110.14168), MATH (Hendrycks et al. 2021, arXiv
2103.03874); the tags are those of DeepSeek-R1 (arXiv 2501.12948).
"""

from __future__ import annotations

import json
import re

from tokalign.rewards.answers.forms import LIST_CAP, read_form, unwrap
from tokalign.rewards.answers.notation import plain_notation
from tokalign.rewards.answers.quantities import UNIT_NAMES, Form, plain_number

TEXT_CAP = 20_000  # characters, from the end of a completion, in which an answer is looked for

_THINKING = re.compile(r"(?i:<(/?)(?:think|thinking|thought|reasoning|seed:think)>|\[(/?)think\])")
_ANSWER_TAG = re.compile(r"(?i:<(/?)(?:final_?)?answer>)")
_BOX = re.compile(r"\\f?box(?:ed)?\s?(?=\{)")
_BOX_TOKENS = re.compile(r"(\\f?box(?:ed)?\s?\{)|\\.|[{}]", re.DOTALL)
_ANSWER_IS = (
    r"\b(?:answers?|(?<!no )(?:correct|right) (?:option|choice))\b[*_]{0,2}(?:[ \t]{0,4}(?:is|are|[:=])[*_]{0,2}){1,2}"
)
_HEADING = r"[#*_ \t]{0,9}(?:the )?(?:final )?answer[:*_ \t]{0,9}"
_SAID = re.compile(rf"(?i:{_ANSWER_IS})")
_PHRASE = re.compile(rf"(?i:{_ANSWER_IS}|^[ \t>*]{{0,8}}A[ \t]?:[*_]{{0,2}}|^{_HEADING}$)", re.MULTILINE)
_ANSWER_HEADING = re.compile(rf"(?i:{_HEADING})")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
_LEADING_NUMBER = re.compile(  # followed by prose, not by more of an expression or of a list
    r"[ \t]*+(-? ?[$£€¥₹]? ?-?(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++|/\d++)?+ ?%?)"
    r"[ ,;:(*]{1,4}(?!(?:and|sqrt|sin|cos|tan|cot|sec|csc|log|exp|plus|minus|times|over)(?![a-z]))[A-Za-z]{3}"
)
_LEADING_CHOICE = re.compile(r"\(?[A-J]\)?(?=,? (?:because|since|as)\b)")
_NEXT_BOX = re.compile(  # what stands between the boxes of one list, in plain notation
    r"[\s$)\]\\]{0,9},[\s,$(\[\\]{0,9}(?:[A-Za-z](?:_\w)? ?= ?)?[\s$(\[\\]{0,9}"
)
_INLINE_MATH = re.compile(r"\s{0,9}(?:\$([^$\n]{1,2000})\$|\\\((.{1,2000}?)\\\))")
_NUMBER_IN_TEXT = re.compile(r"(?<![\d.,A-Za-z])-?[$£€¥₹]?(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++|/\d++)?+")


def _tidy(content: str) -> str | None:
    content = " ".join(content.split())
    form = read_form(content)
    if form.kind == "number" and not form.name:
        return plain_number(form, fraction="/" in content or "frac" in content)
    return unwrap(content) or None


def _after_thinking(text: str) -> str:
    """What follows the last finished thinking, without a later one that is not finished."""
    start, end = 0, None
    for tag in _THINKING.finditer(text):
        if tag[1] or tag[2]:
            start, end = tag.end(), None
        elif end is None:
            end = tag.start()
    return text[start:end]


def _last_tagged(text: str) -> str | None:
    """Content of the last `<answer>` that is closed."""
    content, opened = None, -1
    for tag in _ANSWER_TAG.finditer(text):
        if tag[1] and opened >= 0:
            content = text[opened : tag.start()]
        opened = -1 if tag[1] else tag.end()
    return content


def _last_marked(text: str) -> str | None:
    """After the last `####`: a number on any line, anything else on the last line only (elsewhere it is a heading)."""
    text = text.rstrip("#* \t\n")
    end = len(text)
    for _ in range(1000):  # headings may follow the answer; nobody writes a thousand
        start = text.rfind("####", 0, end)
        if start < 0:
            return None
        line, newline, below = text[start + 4 : end].partition("\n")
        if _ANSWER_HEADING.fullmatch(line):
            line, newline, _ = below.strip().partition("\n")
        line, last_line = line.strip("# \t"), end == len(text) and not newline
        if phrases := list(_PHRASE.finditer(line)):
            line = line[phrases[-1].end() :]
        if line.strip() and (last_line or read_form(line).kind in ("number", "digits")):
            return line
        end = start
    return None


def _last_boxed(text: str) -> str | None:
    """Content of the last complete box, and of those before it that only a comma, "and" or "or" parts from it."""
    # A stack rather than a pattern: boxes hold braces of any depth, and a completion may leave some open.
    open_braces: list[tuple[int, int]] = []  # where a box and its content start, (-1, -1) for any other brace
    boxes: list[tuple[int, int, int]] = []  # start of the box, start and end of its content, in the order of the ends
    for token in _BOX_TOKENS.finditer(text):
        if token[1]:
            open_braces.append(token.span())
        elif token[0] == "{":
            open_braces.append((-1, -1))
        elif token[0] == "}" and open_braces:
            box, start = open_braces.pop()
            if box >= 0:
                boxes.append((box, start, token.start()))
    contents: list[str] = []
    first = len(text)  # start of the first box taken; one that ends behind it is nested in it
    for box, start, end in reversed(boxes):
        if end > first:
            continue
        between = text[end + 1 : first]
        if contents and not (len(between) <= 60 and _NEXT_BOX.fullmatch(plain_notation(between))):
            break
        content = _BOX.sub("", text[start:end])
        if content not in contents:
            contents.insert(0, content)
        if len(contents) == LIST_CAP:
            break
        first = box
    if len(contents) == 1 and _SAID.search(contents[0]):
        content = plain_notation(contents[0])
        return content[[said.end() for said in _SAID.finditer(content)][-1] :] if _SAID.search(content) else content
    return ", ".join(contents) if contents else None


def _last_phrase(text: str) -> str | None:
    """What follows the last "answer is", "answer:" or line-initial "A:", up to the end of the sentence."""
    ends = [phrase.end() for phrase in _PHRASE.finditer(text)]
    if not ends:
        return None
    content = text[ends[-1] :].lstrip(" \t\n*_")
    if math := _INLINE_MATH.match(content):
        return math[1] or math[2]
    if end := _SENTENCE_END.search(content):
        content = content[: end.end() if content[: end.end()].endswith("...") else end.start()]  # "0.333..." goes on
    # People write the sum before its result; the result is the answer, unless the left side names an unknown.
    left, equals, right = content.rpartition("=")  # "3 + 4 = 7"
    if equals and not any(map(str.isalpha, left)) and read_form(right).kind == "number":
        return right
    if choice := _LEADING_CHOICE.match(content):
        return choice[0]  # "(B), because …"
    form = read_form(content)
    if form.kind in ("expression", "list") and not _measures(form) and (number := _LEADING_NUMBER.match(content)):
        return number[1]  # "18, because …"
    return content


def _measures(form: Form) -> bool:
    """Whether it is one quantity in several units, such as "2 hours and 30 minutes"."""
    return form.kind == "list" and all(part.kind == "number" and part.unit in UNIT_NAMES for part in form.parts)


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

    Only what follows the thinking counts (`</think>` and the like); an unfinished thinking states nothing. In this
    order: the `answer` of a completion that is a JSON object; the last `<answer>…</answer>`; the last `#### …`; the
    last complete `\boxed{…}`; the last "answer is …", "answer: …" or line that starts with "A:". Returns a number
    without currency, separators, unit and trailing zeros ("$1,234.50" is "1234.5", "6/8" is "3/4"), any other answer
    as written without its delimiters. Linear in the text.
    """
    text = _after_thinking(text)
    if len(text) <= TEXT_CAP and (answer := _json_answer(text)) is not None:
        return _tidy(answer)
    text = text[-TEXT_CAP:]
    tagged = _last_tagged(text)
    # From the most deliberate mark to the least. The last one counts: a solution may box steps on its way. A tag holds
    # the bare answer, or marks it in turn.
    if tagged is not None and (answer := _stated(tagged) or _tidy(_json_answer(tagged) or tagged)) is not None:
        return answer
    if (answer := _stated(text)) is not None:
        return answer
    if last_number and (numbers := _NUMBER_IN_TEXT.findall(text)):
        return _tidy(numbers[-1])
    return None


def _stated(text: str) -> str | None:
    for find in (_last_marked, _last_boxed, _last_phrase):
        if (content := find(text)) is not None and (answer := _tidy(content)) is not None:
            return answer
    return None
