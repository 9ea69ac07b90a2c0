"""Notations of one answer that have to match, each kind beside the near misses that must not; tags, thinking, boxes."""

from __future__ import annotations

import pytest

from tokalign.rewards import answers_match, extract_answer

# kind: pairs that match, near misses of the same kind that do not
FORMS: dict[str, tuple[list[tuple[str, str]], list[tuple[str, str]]]] = {
    "complex numbers": (
        [
            ("6 + 9 i", "6+9i"),
            ("6+9\\,i", "6+9i"),
            ("6+9\\mathrm{i}", "6+9i"),
            ("6+9\\cdot i", "6+9i"),
            ("6+9*i", "6+9i"),
            ("9i+6", "6+9i"),
            ("(1+i)^2", "2i"),
            ("i^2", "-1"),
            ("\\sqrt{-4}", "2i"),
            ("-i", "\\frac{1}{i}"),
            ("\\frac{1+i}{1-i}", "i"),
            ("e^{i\\pi}", "-1"),
            ("z=3+4i", "3+4i"),
            ("2 \\pm 3i", "2+3i, 2-3i"),
            ("x = 1 + i or x = 1 - i", "1 \\pm i"),
        ],
        [
            ("6+9i", "6-9i"),
            ("6+9i", "9+6i"),
            ("6+9i", "15i"),
            ("6+9i", "15"),
            ("i", "1"),
            ("2i", "2"),
            ("10^{-20}i", "2\\cdot 10^{-20}i"),
            ("2z=6+8i", "z=3+4i"),
        ],
    ),
    "roots and fractions in one character": (
        [
            ("√2", "\\sqrt{2}"),
            ("2√3", "\\sqrt{12}"),
            ("√12", "2\\sqrt{3}"),
            ("√(x+1)", "\\sqrt{x+1}"),
            ("√2/2", "\\frac{\\sqrt{2}}{2}"),
            ("sqrt3", "\\sqrt{3}"),
            ("sqrt(2+sqrt(3))", "\\sqrt{2+\\sqrt{3}}"),
            ("∛8", "2"),
            ("½", "1/2"),
            ("⅓", "1/3"),
            ("2¾", "11/4"),
            ("-2½", "-2.5"),
        ],
        [
            ("√2", "2"),
            ("√2", "1.41421356"),
            ("√23", "√2·3"),
            ("∛8", "√8"),
            ("½", "1/3"),
            ("½", "12"),
            ("1½", "1/2"),
            ("1½", "11/2"),
            ("2½", "21/2"),
        ],
    ),
    "mixed numbers": (
        [("1 3/4", "7/4"), ("1\\frac34", "7/4"), ("1\\tfrac{3}{4}", "1¾")],
        [("1 3/4", "13/4"), ("1\\frac34", "3/4")],
    ),
    "powers and subscripts": (
        [
            ("5 × 10⁻³", "0.005"),
            ("1.5*10^-3", "0.0015"),
            ("1.5 x 10^12", "1500000000000"),
            ("2·10^(-3)", "0.002"),
            ("10^-3", "0.001"),
            ("x²+1", "x^{2}+1"),
            ("x**2", "x^2"),
            ("x ** 2 + 1", "x^2+1"),
            ("2**10", "1024"),
            ("2**-1", "0.5"),
            ("**18**", "18"),
            ("x_1", "x_{1}"),
            ("x₁", "x_1"),
            ("x₁₂", "x_{12}"),
        ],
        [
            ("10^-3", "1000"),
            ("10^-3", "10-3"),
            ("1.5*10^-3", "1.5*10^3"),
            ("x**2", "x*2"),
            ("x**2", "2x"),
            ("2**3", "23"),
            ("1e9**1e9", "1e9"),
            ("x²", "x2"),
            ("x₁", "x1"),
            ("x_1", "x_2"),
            ("x_{12}", "x_1"),
            ("x₁2", "x_{12}"),
        ],
    ),
    "type and spaces": (
        [
            ("\\boldsymbol{5}", "5"),
            ("\\bm{5}", "5"),
            ("\\boldsymbol{\\frac{1}{2}}", "0.5"),
            ("{\\bf 5}", "5"),
            ("\\underline{5}", "5"),
            ("\\mathbf{x}+1", "x+1"),
            ("{3 \\over 4}", "3/4"),
            ("5\\,", "5"),
            ("5\\ ", "5"),
            ("58\\,500", "58500"),
            ("1\\,234\\,567", "1,234,567"),
            ("12\\ 345", "12345"),
            ("12\u202f345", "12345"),
            ("11,\\! 111", "11111"),
            ("５", "5"),
            ("（１，２）", "(1,2)"),
            ("𝟓", "5"),
            ("θ", "\\theta"),
            ("2πr", "2\\pi r"),
        ],
        [
            ("58\\,50", "5850"),
            ("58 500", "58500"),
            ("5\\,500\\,5", "55005"),
            ("0.123\\,456", "123456"),
            ("x^2\\,500", "x^2500"),
            ("{3 \\over 4}", "4/3"),
            ("１２", "1,2"),
        ],
    ),
    "repeating decimals": (
        [
            ("0.\\overline{3}", "1/3"),
            ("0.\\overline3", "1/3"),
            ("0.\\bar{3}", "1/3"),
            ("-0.\\dot{3}", "-1/3"),
            ("0.(3)", "1/3"),
            ("0.1\\overline{6}", "1/6"),
            ("0.\\overline{142857}", "1/7"),
            ("0.333...", "1/3"),
            ("0.333…", "1/3"),
            ("0.1666\\ldots", "1/6"),
            ("0.142857142857...", "1/7"),
            ("18.000...", "18"),
        ],
        [
            ("0.333", "1/3"),
            ("0.33...", "1/3"),
            ("0.\\overline{3}", "0.3"),
            ("0.\\overline{3}", "0.33"),
            ("0.1\\overline{6}", "0.\\overline{16}"),
            ("3.14159...", "\\pi"),
            ("0.12123...", "0.12"),
        ],
    ),
    "inequalities": (
        [
            ("x ≤ 3", "x \\leq 3"),
            ("x ≤ 3", "(-\\infty, 3]"),
            ("x > 5", "(5,\\infty)"),
            ("5 < x", "x > 5"),
            ("3 <= x", "x \\in [3, ∞)"),
            ("x > 5", "(5,+\\infty)"),
            ("x < 5", "(-oo, 5)"),
            ("1<x<2", "(1,2)"),
            ("2>x>1", "1<x<2"),
            ("1 \\le x < 2", "[1,2)"),
            ("x < \\sqrt{12}", "(-\\infty, 2\\sqrt{3})"),
            ("x<1 or x>2", "(-\\infty,1)\\cup(2,\\infty)"),
            ("x<1, x>2", "(2,\\infty)∪(-\\infty,1)"),
            ("x < -1 \\text{ or } x > 1", "(-\\infty,-1) U (1,\\infty)"),
            ("x>1 and x<5", "(1,5)"),
            ("x<=5 \\land x>1", "1<x<=5"),
            ("\\{x \\mid x > 5\\}", "x>5"),
            ("\\{x \\in \\mathbb{R} : 1 \\le x \\le 3\\}", "[1,3]"),
            ("x \\neq 3", "(-\\infty,3)\\cup(3,\\infty)"),
            ("x != 3", "\\mathbb{R}\\setminus\\{3\\}"),
            ("x+1 < 3", "x < 2"),
        ],
        [
            ("x<5", "(-oo,5]"),
            ("x<5", "x<=5"),
            ("x<5", "x>5"),
            ("x<5", "y<5"),
            ("x<5", "5"),
            ("x>5", "(5,6)"),
            ("1<x<2", "[1,2]"),
            ("1<x<2", "1<y<2"),
            ("1<x<2", "1,2"),
            ("1<x<2", "(x,y)=(1,2)"),
            ("1<x>2", "x>2"),
            ("x<1 or x>2", "1<x<2"),
            ("x<1 or x>2", "(1,2)"),
            ("x<1 or x>2", "(-\\infty,1]\\cup[2,\\infty)"),
            ("x>1 and x<5", "x>1 or x<5"),
            ("x<1 and x>2", "x<1 or x>2"),
            ("x<1 and x>2", "(2,1)"),
            ("x \\neq 3", "3"),
            ("x \\neq 3", "x=3"),
            ("x \\neq 3", "\\mathbb{R}"),
        ],
    ),
    "no numbers and all numbers": (
        [
            ("\\emptyset", "\\varnothing"),
            ("∅", "\\{\\}"),
            ("no solution", "\\emptyset"),
            ("\\mathbb{R}", "(-\\infty,\\infty)"),
            ("all real numbers", "ℝ"),
            ("x \\in \\mathbb{R}", "\\mathbb{R}"),
        ],
        [
            ("\\emptyset", "0"),
            ("\\emptyset", "\\{0\\}"),
            ("no solution", "solution"),
            ("\\mathbb{R}", "\\mathbb{Z}"),
            ("\\mathbb{R}", "R"),
            ("\\mathbb{R}^2", "\\mathbb{R}"),
        ],
    ),
    "solutions and pairs with names": (
        [
            ("x = 1 or x = 2", "\\{1,2\\}"),
            ("x=1, x=2", "2, 1"),
            ("(x,y)=(1,2)", "(1,2)"),
            ("x=1,y=2", "(x, y) = (1, 2)"),
            ("y=2,x=1", "(1,2)"),
            ("3=x", "3"),
            ("\\theta = 30^\\circ", "30"),
        ],
        [
            ("x = 1 or x = 2", "(1,2)"),
            ("x = 1 or x = 2", "\\{1,3\\}"),
            ("x=1,y=2", "(2,1)"),
            ("y=1,x=2", "(1,2)"),
            ("x=1,y=2", "(x,y)=(2,1)"),
            ("(x,y)=(1,2)", "(y,x)=(1,2)"),
        ],
    ),
    "equations": (
        [
            ("x=2y", "y=x/2"),
            ("x=2y", "2y=x"),
            ("x=y", "y=x"),
            ("y=2x+3", "2x-y+3=0"),
            ("y = -\\frac{1}{2}x + 1", "x + 2y = 2"),
        ],
        [
            ("x=2y", "y=2x"),
            ("y=2x+3", "2x+3y=0"),
            ("y=x^2", "x=y^2"),
            ("y=x", "y=-x"),
            ("2x=4", "x=2"),  # the problem is not its solution
            ("2x+3=7", "2"),
        ],
    ),
    "multiple choice": (
        [
            ("b", "B"),
            ("(b)", "B"),
            ("b)", "B"),
            ("(e)", "E"),
            ("Option B", "B"),
            ("option e", "E"),
            ("Choice_B", "B"),
            ("Option (B): x", "B"),
            ("Choice B: open", "B"),
            ("B) 18", "B"),
            ("B. 18", "(B)"),
            ("(B) 18", "18"),
            ("(B) 18", "(B) \\$18"),
            ("E: some text", "E"),
            ("option $B$: a point", "B"),
            ("\\text{(B)}", "b"),
            ("\\textbf{(B)}\\ 18", "B"),
        ],
        [
            ("b", "C"),
            ("e", "E"),  # the number
            ("i", "I"),
            ("x", "X"),
            ("x=a", "A"),
            ("(a,b)", "(A,B)"),
            ("a+1", "A"),
            ("(a) + 5", "A"),
            ("(a)(b)", "A"),
            ("a - 5", "A"),
            ("a 5", "A"),
            ("B 18", "B"),
            ("(B) 18", "C"),
            ("(B) 18", "19"),
            ("(B) 18", "(B) 19"),
            ("(B) 18", "(C) 18"),
            ("(A) 3 (B) 4", "A"),
            ("A: 5, B: 7", "A"),
            ("A or B", "A"),
            ("B, C", "B"),
            ("Option B or C", "B"),
            ("(B) is wrong", "B"),
            ("not B", "B"),
        ],
    ),
    "ratios": (
        [("3:2", "3/2"), ("3:2", "1.5"), ("6:4", "3:2"), ("2:4:6", "1:2:3"), ("1.5:1", "3:2"), ("3 \\colon 2", "3:2")],
        [
            ("3:2", "2:3"),
            ("3:2", "32"),
            ("1:2:3", "1/2"),
            ("1:2:3", "1:2:4"),
            ("5:05", "1"),
            ("5:05", "5:5"),
            ("1:0", "0"),
        ],
    ),
    "units": (
        [
            ("20 °C", "20"),
            ("20 degrees Celsius", "20^\\circ C"),
            ("20°", "20 °C"),
            ("¥500", "500"),
            ("¥500", "500 yen"),
            ("¥500", "500 yuan"),
            ("50 percent", "50\\%"),
            ("30 degrees", "30°"),
        ],
        [("20 °C", "20 °F"), ("20 cm", "20 °C"), ("¥500", "$500"), ("500 yen", "500 yuan"), ("50%", "1/2")],
    ),
    "matrices": (
        [
            ("\\left(\\begin{array}{cc}1&2\\\\3&4\\end{array}\\right)", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"),
            ("\\left|\\begin{array}{cc}1&2\\\\3&4\\end{array}\\right|", "\\begin{vmatrix}1&2\\\\3&4\\end{vmatrix}"),
        ],
        [
            ("\\left(\\begin{array}{cc}1&2\\\\3&4\\end{array}\\right)", "\\begin{vmatrix}1&2\\\\3&4\\end{vmatrix}"),
            ("\\left(\\begin{array}{cc}1&2\\\\3&4\\end{array}\\right)", "\\begin{pmatrix}1&3\\\\2&4\\end{pmatrix}"),
        ],
    ),
    "words of any script": ([("Кошка", "кошка"), ("ÉTÉ", "été")], [("Кошка", "собака"), ("кот", "ток")]),
}


@pytest.mark.parametrize("kind", FORMS)
def test_one_answer_in_many_notations_matches_and_its_near_misses_do_not(kind: str) -> None:
    same, different = FORMS[kind]
    for first, second in same:
        assert answers_match(first, second), (first, second)
        assert answers_match(second, first), (second, first)
    for first, second in different:
        assert not answers_match(first, second), (first, second)
        assert not answers_match(second, first), (second, first)


EXTRACTED = [
    # tags
    ("<think>2+3</think>\n<answer>5</answer>", "5"),
    ("<answer> \\boxed{5} </answer>", "5"),
    ("<answer>The answer is 5.</answer>", "5"),
    ('<answer>{"answer": 5}</answer>', "5"),
    ("<answer>(1+2)*3</answer>", "(1+2)*3"),
    ("<answer>4</answer> no, <answer>5</answer>", "5"),
    ("<answer>5</answer> and, cut off: <answer>6", "5"),
    ("\\boxed{4} <answer>5</answer> \\boxed{6}", "5"),
    ("<answer></answer> \\boxed{4}", "4"),
    ("<reasoning>\n16-3\n</reasoning>\n<ANSWER>\n18\n</ANSWER>\n", "18"),
    ("<answer>5", None),
    ("</answer>5<answer>", None),
    # thinking
    ("<think>So \\boxed{4} maybe, or", None),
    ("<think>\n#### 7", None),
    ('<think>{"answer": 3}', None),
    ("<thinking>\\boxed{4}", None),
    ("<think>\\boxed{4}</think> so five", None),
    ("<think>\\boxed{4}</think> so \\boxed{5}", "5"),
    ("\\boxed{4}</think> #### 5", "5"),  # the prompt opened the thinking
    ("<think>a</think> \\boxed{5} <think>\\boxed{6}", "5"),
    ("<think>a</think> \\boxed{5} <think>\\boxed{6}</think>", None),
    ("[THINK]\\boxed{4}[/THINK] \\boxed{6}", "6"),
    ('<think>a</think>{"answer": 18}', "18"),
    ('<think>a</think>\n```json\n{"answer": 18}\n```', "18"),
    ("<think>" + "x " * 20_000 + "\\boxed{4}", None),  # opened before what is searched
    # boxes
    ("\\boxed{\\boxed{5}}", "5"),
    ("\\boxed{x = \\boxed{5} + 1}", "x = {5} + 1"),
    ("$\\boxed{1}$ and $\\boxed{2}$", "1, 2"),
    ("x = \\boxed{1} or x = \\boxed{2}", "1, 2"),
    ("\\boxed{1}, \\boxed{2} \\text{ and } \\boxed{3}", "1, 2, 3"),
    ("\\boxed{5} and \\boxed{5}", "5"),
    ("\\boxed{1}. Then \\boxed{2}", "2"),
    ("\\boxed{1}\n\n\\boxed{2}", "2"),
    ("\\boxed{1}, no, \\boxed{2}", "2"),
    ("\\boxed{2\\sqrt{5}\\,}", "2\\sqrt{5}"),
    ("\\boxed{x^2\\;}", "x^2"),
    ("\\boxed{\\,5\\;\\ }", "5"),
    ("\\boxed{5\\!}", "5"),
    ("\\boxed{5\\,.}", "5"),
    ("\\boxed{5!}", "5!"),
    ("\\boxed{58\\,500\\,}", "58500"),
    ("\\boxed{\\text{The answer is } 5}", "5"),
    ("\\boxed{E: some text}", "E: some text"),
    # phrases and headings
    ("The correct answer is (B) 18.", "(B) 18"),
    ("The answer is (B), because 18 is even.", "(B)"),
    ("The answer is B because it is.", "B"),
    ("The correct option is C.", "C"),
    ("No correct option is provided", None),
    ("#### Final Answer\n18", "18"),
    ("#### Final Answer:\nThe answer is 18.", "18"),
    ("#### Final Answer\nThe total.\n\\boxed{18}", "18"),
    ("**Final Answer**\n\n18", "18"),
    ("The answer is 2 hours and 30 minutes.", "2 hours and 30 minutes"),
    ("The answer is 5 apples and 3 oranges.", "5"),
    ("The answer is 0.333...", "1/3"),
    ("The answer is 18... I think.", "18"),
    ("The answer is ¥500.", "500"),
    ("The answer is 5:30.", "5:30"),
]


@pytest.mark.parametrize(("text", "answer"), EXTRACTED)
def test_extracts_from_tags_boxes_and_headings_and_never_from_thinking(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize("text", ["<think>3 or 4", "<think>3</think>"])
def test_no_number_of_the_thinking_is_a_last_number(text: str) -> None:
    assert extract_answer(text, last_number=True) is None


def test_joined_boxes_hedge_nothing() -> None:
    assert not answers_match(extract_answer("\\boxed{1} or \\boxed{2}"), "2")
    assert answers_match(extract_answer("\\boxed{1} or \\boxed{2}"), "\\{2,1\\}")
