"""Final answers: conventions, no accidental matches, bounded time, and every ground truth of GSM8K and MATH-500."""

from __future__ import annotations

import json
import os
import threading
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokalign.rewards import answers_match, extract_answer
from tokalign.rewards.answers import equivalence as math_equivalence
from tokalign.rewards.answers.forms import read_form

DATA = Path(os.environ.get("TOKALIGN_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_data = pytest.mark.skipif(
    not (DATA / "gsm8k" / "train.jsonl").exists(),
    reason=f"no data under {DATA}; set TOKALIGN_SHARED_DATA to its folder",
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She makes 9 * 2 = 18.\n#### 18", "18"),
        ("#### 1\n#### 2", "2"),
        ("#### 18\n\nI hope this helps!", "18"),
        ("#### -$5", "-5"),
        ("#### $1,000.00", "1000"),
        ("#### 18 dollars", "18"),
        ("#### 10 * 2", "10 * 2"),
        ("#### 5/7/2020", "5/7/2020"),
        ("\\boxed{3}\n#### 4", "4"),
        ("#### Step 3: add\nso \\boxed{7}", "7"),
        ("A: 18", "18"),
        ("Q: how many?\nA: 18 eggs", "18"),
        ("The answer is $18.50.", "18.5"),
        ("The answer is $18 per day, since 2*9 = 18.", "18"),
        ("The answer is 18 because she ate 3 of 4.", "18"),
        ("The answer is 3 + 4 = 7.", "7"),
        ("The answer is 12 pi.", "12 pi"),
        ("The answers are 1 and 2.", "1 and 2"),
        ("The answer is 50%.", "50"),
        ("The answer is east.", "east"),
        ("answer: -3/4", "-3/4"),
        ("The answer is 1,234,567.", "1234567"),
        ("The final answer is: **18**", "18"),
        ("the answer is\n\n42", "42"),
        ("Answer: (2, 4)", "(2, 4)"),
        ("Final answer: $\\frac{3}{4}$ hours", "3/4"),
        ("\\boxed{1}, no, \\boxed{\\frac{\\sqrt{3}}{2}}.", "\\frac{\\sqrt{3}}{2}"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{5} and then cut off: \\boxed{\\frac{1}{", "5"),
        ('{"steps": [{"value": 3}], "answer": 12}', "12"),
        ('```json\n{"answer": "1,200"}\n```', "1200"),
        ('{"answer": null}', None),
        ("so we have 5 left", None),
        ("####", None),
        ("", None),
    ],
)
def test_extracts_by_precedence(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_last_number_is_taken_only_on_request() -> None:
    assert extract_answer("first 3 and then $7.50 in all") is None
    assert extract_answer("first 3 and then $7.50 in all", last_number=True) == "7.5"


def test_only_the_end_of_a_long_text_is_read() -> None:
    assert extract_answer("#### 1\n" + "x " * 20_000) is None
    assert extract_answer("x " * 20_000 + "\n#### 1") == "1"


SAME = [
    ("18.50", "18.5"),
    ("1,000", "1000"),
    ("1{,}234", "1,234"),
    ("1/2", "0.5"),
    ("$\\frac{1}{2}$", ".5"),
    ("50%", "50"),
    ("$18", "18 dollars"),
    ("18 apples", "18"),
    ("2 million", "2000000"),
    ("−5", "-5"),
    ("(2,4)", "( 2, 4 )"),
    ("\\text{east}", "{east}"),
    ("East.", "east"),
    ("10^\\circ", "10"),
    ("90°", "90^{\\circ}"),
    ("x=3", "3"),
    ("\\text{(A)}", "A"),
    ("{3}", "3"),
    ("(3)", "3"),
    ("1\\frac{4}{5}", "9/5"),
    ("137 1/2", "137\\frac{1}{2}"),
    ("\\frac{270}7", "270/7"),
    ("0.0000672", "6.72 \\times 10^{-5}"),
    ("1\\pm\\sqrt{19}", "1+\\sqrt{19},1-\\sqrt{19}"),
    ("x \\in [-2,7]", "[-2,7]"),
    ("\\begin{pmatrix}-7\\16\\5\\end{pmatrix}", "\\begin{pmatrix} -7 \\\\ 16 \\\\ 5 \\end{pmatrix}"),
    ("52_8", "52_{8}"),
    ("3\\sqrt{13}", "\\sqrt{117}"),
    ("2k+2", "2(k+1)"),
    ("0.5x", "\\frac{x}{2}"),
    ("1, 2 and 3", "\\{3,2,1\\}"),
    ("(-\\infty, 2) \\cup (3, \\infty)", "(3,\\infty)\\cup(-\\infty,2)"),
    ("5\\text{ cm}^2", "5"),
    ("5 square feet", "5 ft^2"),
    ("5x-7y+11z+4=0", "10x-14y+22z+8=0"),
    ("y = 2x+3", "2x + 3"),
]
DIFFERENT = [
    ("50%", "0.5"),
    ("(1,2)", "12"),
    ("1,2", "12"),
    ("1,23", "123"),
    ("(1,234)", "1234"),
    ("1 2", "12"),
    ("1:2", "12"),
    ("2 1/2", "21/2"),
    ("1,2", "(1,2)"),
    ("(1,2)", "(2,1)"),
    ("[0,1)", "(0,1]"),
    ("(0,1)", "[0,1]"),
    ("east", "seat"),
    ("52_8", "52"),
    ("0.333333333333", "1/3"),
    ("1.414214", "\\sqrt{2}"),
    ("0.0000672", "0.0000671"),
    ("10^{-20}\\pi", "2\\cdot10^{-20}\\pi"),
    ("5 cm", "5 m"),
    ("2m", "2"),
    ("x=3", "y=3"),
    ("(B)", "(C)"),
    ("3!", "3"),
    ("1/0", "0"),
    ("2^3", "23"),
    ("x^2", "x2"),
    ("0.\\overline{3}", "0.3"),
    ("x<3", "x\\le3"),
    ("5x-7y+11z+4=0", "0"),
    ("2^{10}", "2^{1}0"),
    ("", ""),
]


@pytest.mark.parametrize(("first", "second"), SAME)
def test_the_same_answer_written_differently_matches(first: str, second: str) -> None:
    assert answers_match(first, second)
    assert answers_match(second, first)


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_different_answers_do_not_match(first: str, second: str) -> None:
    assert not answers_match(first, second)
    assert not answers_match(second, first)


def test_none_never_matches_and_a_list_of_references_accepts_any() -> None:
    assert not answers_match(None, "3")
    assert not answers_match("3", None)
    assert not answers_match(None, None)
    assert answers_match("0.5", ["1/3", "\\frac{1}{2}"])
    assert not answers_match("0.5", [])


@settings(max_examples=200, deadline=None)
@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_an_integer_matches_itself_in_every_formatting_and_never_another(number: int, difference: int) -> None:
    sign, digits = ("-", -number) if number < 0 else ("", number)
    grouped = f"{digits:,}"
    ways = [
        f"{sign}{digits}",
        f"{sign}{grouped}",
        f"{sign}${grouped}.00",
        f"${number}",
        f"{number} eggs",
        f"{number}.0",
    ]
    ways += [
        f"\\boxed{{{number}}}",
        f"{sign}{grouped.replace(',', '{,}')}",
        f"x = {number}",
        f"{2 * number}/2",
        f"{number}\\%",
    ]
    for way in ways:
        assert answers_match(way, str(number)), way
        assert answers_match(extract_answer(f"#### {way}"), str(number)), way
        assert answers_match(extract_answer(f"The answer is {way}."), str(number)), way
        assert not answers_match(way, str(number + difference)), way
        assert not answers_match(way, f"{number + difference:,}"), way


@settings(max_examples=200, deadline=None)
@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
def test_fractions_match_exactly_when_equal(first: Fraction, second: Fraction) -> None:
    def ways(value: Fraction) -> list[str]:
        sign, n, d = "-" if value < 0 else "", abs(value.numerator), value.denominator
        return [
            f"{sign}{n}/{d}",
            f"{sign}\\frac{{{n}}}{{{d}}}",
            f"\\dfrac{{{sign}{n}}}{{{d}}}",
            f"{sign}{3 * n}/{3 * d}",
        ]

    for one in ways(first):
        assert all(answers_match(one, way) for way in ways(first))
        assert all(answers_match(one, way) == (first == second) for way in ways(second))


@settings(max_examples=200, deadline=None)
@given(st.decimals(-(10**9), 10**9, places=4), st.decimals(-(10**9), 10**9, places=4))
def test_decimals_match_exactly_when_equal(first, second) -> None:
    for way in (f"{first}", f"{first}0", f"${first:,}", f"{first} miles"):
        assert answers_match(way, str(first))
        assert answers_match(way, str(second)) == (first == second)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-99, 99), min_size=2, max_size=4), st.lists(st.integers(-99, 99), min_size=2, max_size=4))
def test_tuples_are_ordered_and_lists_are_not(first: list[int], second: list[int]) -> None:
    a, b = (", ".join(map(str, numbers)) for numbers in (first, second))
    assert answers_match(f"({a})", f"({b})") == (first == second)
    assert answers_match(f"\\{{{a}\\}}", f"\\{{{b}\\}}") == (sorted(first) == sorted(second))
    assert not answers_match(f"({a})", a.replace(", ", ""))


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.text(alphabet="0123456789.,/-+^_=<>()[]{}\\$%!#*: \nAaxfrcsqtboedpmin", max_size=60))
def test_any_text_is_handled(text: str) -> None:
    answer = extract_answer(text)
    assert answer is None or answer.strip()
    assert answers_match(text, text) or not text.strip() or read_form(text).kind == "expression"
    assert not answers_match(text, "31415926.5") or "3" in text


HOSTILE = [
    "9^9^9^9",
    "9^{9^{9^{9}}}",
    "10^{10^{10}}",
    "99999999!",
    "((9^999)^{999})^{999}",
    "1e99999",
    "(x+y+z)^{99}",
    "9" * 10**5,
    "#### " + "9" * 10**5,
    "0." + "0" * 10**5 + "1",
    "1/" * 10**5,
    "1," * 10**6,
    "1 " * 10**5,
    "{" * 10**6,
    "\\boxed{" * 10**5,
    "(" * 10**5 + ")" * 10**5,
    "\\frac{" * 10**5,
    "\\text{" * 10**5,
    "[0," * 10**5,
    "answer is " * 10**5,
    "A:\n" * 10**5,
    "#### " * 10**5,
    "#### Step\n" * 10**5,
    "answer is " + "1/" * 9000,
    "$" * 10**6,
    " " * 10**6,
    "a" * 10**6,
    "-" * 10**6,
    "\\\\" * 10**5,
    "\\pm" * 10**3,
    "1\\pm 1," * 300,
    '{"answer": ' + "[" * 10**4,
    '{"answer": "' + "9" * 15_000 + '"}',
    "{" * 300 + "1" + "}" * 300,
    "<answer>" * 10**5,
    "<answer></answer>" * 10**5,
    "<think>" * 10**5,
    "<think></think>" * 10**5,
    "\\boxed{1}, " * 10**5,
    "\\boxed{" * 10**4 + "}" * 10**4,
    "\\boxed{8" + "\\," * 9_000 + "x}",
    "8" + "\\," * 10**5 + "x",
    "8" + "~" * 10**5 + "x",
    "8" + "\\,000" * 10**5 + ".5",
    "√(" * 10**5 + ")" * 10**5,
    "\\sqrt(" * 300,
    "∛" * 10**5,
    "½" * 10**5,
    "x" + "⁻" * 10**5,
    "ﷺ" * 10**5,
    "x**" * 10**5,
    "1e9**1e9",
    "2**(999*999*999)",
    "i**(9**(9**9))",
    "(1+i)^{999}" * 18,
    "0." + "18" * 900 + "...",
    "0." + "1" * 10**5 + "...",
    "0.1" * 10**5 + "...",
    "0.\\overline{" * 10**5,
    "x<" * 10**5,
    "x<1 or " * 10**5,
    "x<1 and " * 200,
    "\\{x|" * 400,
    "\\mathbb{R}\\setminus\\{" + "8," * 90 + "8\\}",
    "1:" * 10**5,
    "8:" * 900 + "8",
    "(x," * 10**5 + "x)=",
    "x=8," * 400,
    "{1\\over" * 10**5,
    "(\\begin{array}{" * 10**4,
    "(B) " * 10**5,
    "Option " * 10**5,
    "#### Final answer\n" * 10**5,
    "The answer is 2 hours and " * 10**4,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: f"{text[:12]!r}x{len(text)}")
def test_hostile_text_ends(text: str) -> None:
    answer = extract_answer(text)
    assert answer is None or len(answer) <= 20_000
    for reference in ("7", "x+1"):
        assert not answers_match(text, reference)


def test_huge_numbers_still_compare_exactly() -> None:
    digits = "9" * 10**5
    assert answers_match("$" + digits + ".50", "0" + digits + ".5")
    assert not answers_match(digits, digits[:-1] + "8")


def test_works_in_a_thread_and_after_the_library_process_was_killed() -> None:
    found: list[bool] = []
    assert answers_match("\\sqrt{12}", "2\\sqrt{3}")
    assert math_equivalence._child.process is not None
    math_equivalence._child.process.kill()
    math_equivalence._child.process.wait()
    thread = threading.Thread(target=lambda: found.append(answers_match("\\sqrt{28}", "2\\sqrt{7}")))
    thread.start()
    thread.join()
    assert found == [True]


def test_a_library_process_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_equivalence, "REPLY_SECONDS", 0.0)
    assert not answers_match("\\sqrt{44}", "2\\sqrt{11}")
    assert math_equivalence._child.process is None
    monkeypatch.undo()
    assert answers_match("\\sqrt{52}", "2\\sqrt{13}")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_gets_its_own_library_process() -> None:
    assert answers_match("\\sqrt{20}", "2\\sqrt{5}")
    parents = math_equivalence._child.process
    pid = os.fork()
    if pid == 0:
        right = answers_match("\\sqrt{45}", "3\\sqrt{5}") and math_equivalence._child.process is not parents
        math_equivalence._child.close()
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert answers_match("\\sqrt{80}", "4\\sqrt{5}")
    assert math_equivalence._child.process is parents


# ----------------------------------------------------------------------------------------------------- ground truths


def rows(path: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / path).read_text().splitlines()]


@needs_data
def test_every_gsm8k_ground_truth_is_extracted_and_matches_only_itself() -> None:
    values: dict[object, str] = {}
    for row in rows("gsm8k/train.jsonl") + rows("gsm8k/test.jsonl"):
        truth = row["answer"].rsplit("####", 1)[1].strip()
        assert extract_answer(row["answer"]) == truth.replace(",", "")
        assert answers_match(truth, truth)
        form = read_form(truth)
        assert form.kind == "number"
        # numbers match exactly when their values are equal, so distinct values are distinct answers
        assert values.setdefault(form.value, truth.replace(",", "")) == truth.replace(",", "")


@needs_data
def test_every_published_label_of_the_gsm8k_example_solutions_is_reproduced() -> None:
    checked = 0
    for row in rows("gsm8k/example_model_solutions.jsonl"):
        truth = extract_answer(row["ground_truth"])
        for solution in (value for value in row.values() if isinstance(value, dict)):
            assert answers_match(extract_answer(solution["solution"]), truth) == solution["is_correct"], solution
            checked += 1
    assert checked == 5276


# Pairs of MATH-500 answers that are written differently and mean the same.
EQUAL_IN_MATH500 = {
    ("-2,1", "1,-2"),  # the same two roots in another order
    ("10,080", "10080"),  # thousands separator
    ("15^2", "225"),  # 15 · 15 = 225
}


@needs_data
def test_math500_ground_truths_match_themselves_and_no_other() -> None:
    truths = sorted({answer for row in rows("math500/test.jsonl") for answer in row["answer"]})
    assert len(truths) == 293
    for truth in truths:
        assert answers_match(truth, [truth])
        for text in (f"so $\\boxed{{{truth}}}$.", f"The answer is ${truth}$.", f"#### {truth}"):
            assert answers_match(extract_answer(text), truth), (text, extract_answer(text))
    matching = {
        (a, b) for i, a in enumerate(truths) for b in truths[i + 1 :] if answers_match(a, b) or answers_match(b, a)
    }
    assert matching == EQUAL_IN_MATH500
