"""Verdicts on mathematical answers. A false positive is the worse mistake: each kind of it has a line in WRONG."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import math

DATA = Path(__file__).parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not (DATA / "math500.json").exists(), reason="the problem sets are not here")

RIGHT: list[tuple[str, str]] = [
    (r"\boxed{24 \text{ cm}^{2}}", "24 cm^2"),
    (r"\boxed{5 \text{ miles per hour}}", "5"),
    ("72", "72"),
    ("She sold 48 + 24 = 72 clips.", "72"),
    ("48/2 = 24\n#### 72", "72"),
    ("The answer is off by one: 71.\n#### 72\n", "72"),
    ("#### 1,000", "1000"),
    ("It costs $1,000", "1,000"),
    (r"so $\boxed{\frac{14}{3}}$", r"\frac{14}{3}"),
    (r"\boxed{\dfrac{1}{2}}", "0.5"),
    ("that is 0.5", r"$\frac12$"),
    ("1/2", r"\frac{1}{2}"),
    (r"\boxed{3\sqrt{13}}", r"\sqrt{117}"),
    (r"3\sqrt{13}", r"3\sqrt{13}"),
    (r"\boxed{\{7, 5, 3\}}", r"\{3, 5, 7\}"),
    (r"$\boxed{(3,4]}$", "(3,4]"),
    (r"$\boxed{2(a+5) + b(a+5)}$", "(a+5)(b+2)"),
    (r"$\boxed{1+\sqrt{19}, 1-\sqrt{19}}$", r"1 \pm \sqrt{19}"),
    (r"$\boxed{x=5}$", "5"),
    (r"\boxed{50\%}", "0.5"),
    (r"$\boxed{90}$", r"90^\circ"),
    (r"$\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}$", r"\begin{pmatrix} 1 \\ \frac{4}{2} \end{pmatrix}"),
    (r"$\boxed{\text{Evelyn}}$", r"\text{Evelyn}"),
    (r"First \boxed{3}. Wait, no: \boxed{4}", "4"),
    ("So \\boxed{5}.\nLet me check again. It is \\boxed{7}.", "7"),
    (r"\boxed{\frac{8}{3}}", "2 2/3"),
    ("The answer is 2 1/4", "9/4"),
    (r"\boxed{18}", r"\[18\]"),
    (r"\boxed{18}", r"\begin{equation}18\end{equation}"),
    (r"\boxed{\frac13}", r"0.\overline{3}"),
    (r"\boxed{1500}", "1.5e3"),
    (r"\boxed{1e-3}", "0.001"),
    (r"\boxed{10}", "10 m/s"),
    ("The answer is $9{,}500.", "9500"),
    (r"\boxed{10\,000}", "10,000"),
    (r"#### \$18", "18"),
    ("The answer is (B).", "B"),
    (r"\boxed{45°}", "45"),
    (r"\boxed{１２}", "12"),
    (r"\boxed{72 clips}", "72"),
    ("It's **72**.", "72"),
    ("The final answer is: $3.50", "3.5"),
    ("one million: 1,000,000.", "1000000"),
    (r"\boxed{50\%}", "1/2"),
    ("x = -3", "-3"),
    ("The answer is −3", "-3"),
    (r"\boxed{5}", "x=5"),
    (r"\boxed{x = 2+3 = 5}", "5"),
    (r"\boxed{2x+3}", "y=2x+3"),
    (r"\boxed{2x - y + 3 = 0}", "y=2x+3"),
    (r"\boxed{\left(3, \frac{\pi}{2}\right)}", r"(3,\frac{\pi}{2})"),
    (r"\boxed{3\sqrt{13}}", r"\sqrt{117}"),
    (r"\boxed{2 + 2i, 2 - 2i, -2 + 2i, -2 - 2i}", r"2+2i,\,-2-2i,\,-2+2i,\,2-2i"),
    (r"\boxed{1+\sqrt{19}} and \boxed{1-\sqrt{19}}", r"1 \pm \sqrt{19}"),
    (r"\boxed{(3,\infty)\cup(-\infty,3)}", r"(-\infty, 3) \cup (3, \infty)"),
    (r"\boxed{1/6}", r"0.1\overline{6}"),
    (r"\boxed{2.5}", r"2\frac{1}{2}"),
    (r"\boxed{-5/2}", "-2 1/2"),
    (r"\boxed{A}", r"\text{(A)}"),
    ("The answer is A.", "A"),
    (r"\boxed{\text{East}}", "east"),
    (r"\boxed{6.02 \times 10^{23}}", "6.02e23"),
    ("6.02*10^23 is the answer: 6.02e23", r"6.02 \times 10^{23}"),
    (r"\boxed{1296540}", r"1,\!296,\!540"),
    (r"\boxed{(x+1)^2}", "x^2+2x+1"),
    (r"\boxed{\dfrac{1}{1+x}}", r"\frac{1}{x+1}"),
    (r"\boxed{7, 5, 3}", r"\{3,5,7\}"),
    (r"\boxed{52_8}", "52_8"),
    (r"\boxed{52_{8}}", "52_8"),
    (r"\boxed{52_{\text{8}}}", "52_8"),
    (r"\boxed{10\,\text{cm}}", "10 cm"),
    (r"\boxed{10 cm}", r"10 \text{ cm}"),
    (r"\boxed{45 \text{ degrees}}", r"45^\circ"),
    (r"\boxed{18 \text{ dollars}}", r"\$18"),
    (r"\boxed{\$18.00}", "18"),
    (r"\boxed{3x²}", "3x^2"),
    (r"\boxed{2½}", r"2\frac12"),
    (r"\boxed{[-2,7]}", r"x \in [-2,7]"),
    ("So the answer is\n\n\\[\\boxed{5}\\]", "5"),
    (r"\boxed{\frac{14}{3}}", "14/3"),
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{\sqrt{2}}{2}"),
    (r"\boxed{e}", "e"),
    (r"\boxed{2e}", "2e"),
    (r"\boxed{\log_{2}{3}}", r"\log_2 3"),
    (r"\boxed{10^3}", "1000"),
    (r"\boxed{5!}", "120"),
    (r"\boxed{(1, 2)}", "(1,2)"),
    (r"\boxed{|x|}", "|x|"),
    ("3/4", r"\frac{3}{4}"),
    (r"\frac{3}{4}", "0.75"),
    ("Answer: 7", "7"),
    ("**Answer:** 7", "7"),
    (r"The answer is \(7\).", "7"),
    ("The answer is:\n\n$$7$$", "7"),
    ("I get 1/3", "1/3"),
    ("5 + 6 = 11", "11"),
    (r"\boxed{24 \text{ cm}^2}", "24"),
    (r"\boxed{24\mathrm{~cm}^{2}}", "24"),
    ("#### 70", "70"),
    ("#### $70", "70"),
    ("#### 70 dollars", "70"),
    (r"\boxed{\begin{bmatrix}1&2\\3&4\end{bmatrix}}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
    (r"\boxed{2.0}", "2"),
    (r"\boxed{\text{2}}", "2"),
    (r"\boxed{ {2} }", "2"),
    (r"\boxed{10}", "$10$ dollars"),
    (r"\boxed{2.5}", r"\frac{5}{2} \text{ hours}"),
    (r"\boxed{.5}", "0.5"),
    (r"\boxed{3>x}", "x<3"),
    (r"\boxed{1 < x < 3}", "1<x<3"),
    (r"\boxed{1}", r"\tan 45^\circ"),
    (r"\boxed{60, 120}", r"60^\circ, 120^\circ"),
]
WRONG: list[tuple[str, str]] = [
    (r"\boxed{5 \text{ or more}}", "5"),
    (r"\boxed{5 \text{ or 6}}", "5"),
    (r"\boxed{5 \text{ is wrong}}", "5"),
    (r"\boxed{5 \text{ (mod 7)}}", "5"),
    (r"\boxed{2\frac{-1}{2}}", "1.5"),
    (r"\boxed{24 \text{ cm}^2}", "24 cm"),
    ("", "72"),
    ("I do not know.", "72"),
    ("#### 73", "72"),
    ("72 at first, then 73", "72"),
    (r"$\boxed{72}$ or $\boxed{73}$", "72"),
    (r"\boxed{70}\boxed{71}\boxed{72}", "72"),
    (r"$\boxed{1, 72}$", "72"),
    (r"\boxed{-5}", "5"),
    (r"\boxed{\frac{3}{14}}", r"\frac{14}{3}"),
    ("0.33", r"\frac{1}{3}"),
    (r"\boxed{\{3, 5\}}", r"\{3, 5, 7\}"),
    (r"$\boxed{[3,4]}$", "(3,4]"),
    (r"$\boxed{(a+5)(b+3)}$", "(a+5)(b+2)"),
    (r"\boxed{\frac{1}{", r"\frac{1}{2}"),
    (r"First \boxed{3}. Wait, no: \boxed{4}", "3"),
    (r"\boxed{3} \boxed{4} \boxed{5}", "5"),
    (r"\boxed{4 = 5}", "5"),
    (r"I think \boxed{42}. Hmm, actually \boxed{4", "42"),
    (r"\boxed{\frac{4}{3}}", "2 2/3"),
    ("The answer is 2 1/4", "2"),
    (r"\boxed{0}", r"0.\overline{3}"),
    (r"\boxed{9.1 \times 10^{-31}}", r"1.6 \times 10^{-19}"),
    (r"\boxed{\frac{1}{2^{41}}}", r"\frac{1}{2^{40}}"),
    (r"\boxed{x^2+7=0}", "0"),
    (r"\boxed{10 \text{ kg}}", "10 cm"),
    (r"\boxed{52}", "52_8"),
    (r"\boxed{2t}", "2"),
    (r"\boxed{2}", "2t"),
    (r"\boxed{5d}", "5"),
    ("9/24", "9"),
    (r"\boxed{9:24}", "3:8"),
    (r"\boxed{5^3}", "25"),
    (r"\boxed{5^2}", "52"),
    ("5²", "52"),
    (r"\boxed{52}", "5^2"),
    ("0.333333", "1/3"),
    (r"\boxed{\frac13}", "0.333333"),
    (r"\boxed{\pi}", "3.14159265"),
    (r"\boxed{3.14159265358979}", r"\pi"),
    (r"\boxed{10 cm}", "10 m"),
    (r"\boxed{1 \text{ m}} = 100 cm", "100"),
    ("The answer is 4 or 5", "5"),
    ("4, 5", "5"),
    (r"\boxed{4} or \boxed{5}", "5"),
    (r"\boxed{5} or maybe it's \boxed{4}", "5"),
    (r"\boxed{x=0 \text{ or } 1}", "0"),
    (r"\boxed{x+7=7}", "7"),
    (r"\boxed{y=5}", "x=5"),
    (r"\boxed{y=2x-3}", "y=2x+3"),
    (r"\boxed{2x-3}", "y=2x+3"),
    (r"\boxed{(2,1)}", "(1,2)"),
    (r"\boxed{[1,2]}", "(1,2)"),
    (r"\boxed{(1,2)}", "(1,2]"),
    (r"\boxed{1,2,3}", "1,2"),
    (r"\boxed{1,2}", "1,2,3"),
    (r"\boxed{1 + 10^{-20}}", "1"),
    (r"\boxed{2^{100}+1}", "2^{100}"),
    (r"\boxed{0}", r"\frac{1}{2^{40}}"),
    (r"\boxed{10^{-30}}", "0"),
    (r"\boxed{1 2}", "12"),
    (r"\boxed{1\cdot2}", "12"),
    (r"\boxed{f'(x)}", "f(x)"),
    (r"\boxed{\sin 30^\circ}", r"\sin 30"),
    (r"\boxed{\sin 30}", "1/2"),
    (r"\boxed{A, B}", "A"),
    ("The answer is not A but B.", "A"),
    ("I think A or B", "B"),
    ("west", "east"),
    (r"\boxed{0.01}", "10%"),
    (r"\boxed{500\%+1}", "5"),
    (r"\boxed{\text{odd}}", r"\text{even}"),
    (r"\boxed{\text{not }5}", "5"),
    (r"\boxed{-5}", "5"),
    (r"\boxed{5.0001}", "5"),
    (r"\boxed{\approx 4.9}", "5"),
    (r"\boxed{1,00}", "1000"),
    (r"\boxed{1.000}", "1000"),
    (r"\boxed{1.234}", "1234"),
    ("#### 18\n#### 19", "18"),
    ("18 19", "18"),
    (r"\boxed{}", "18"),
    (r"\boxed{18", "18"),
    (r"\fbox{}", "18"),
    (r"\boxed{-\infty}", r"\infty"),
    (r"\boxed{x^3}", "x^2"),
    (r"\boxed{1.41421356237}", r"\sqrt{2}"),
    (r"\boxed{1.6e-20}", r"1.6 \times 10^{-19}"),
    (r"\boxed{\sqrt[3]{3}}", "3"),
    (r"\boxed{\{4,5\}}", "5"),
    (r"\boxed{x > 3}", r"x \ge 3"),
    (r"\boxed{x \le 3}", r"x \ge 3"),
    (r"\boxed{3}", r"x \ge 3"),
    (r"\boxed{2 \cdot \frac{2}{3}}", "2 2/3"),
    (r"\boxed{100!}", "100"),
    (r"\boxed{3x}", "3"),
    (r"\boxed{A+0}", "a"),
    (r"\boxed{5 \pmod{7}}", "5"),
    (r"\boxed{17_{10}}", "17"),
    (r"\boxed{\phantom{3}4}", "3"),
    (r"\boxed{45'}", "45"),
    (r"\boxed{4:5}", "4.5"),
    (r"\boxed{\frac{0}{0}}", "1"),
    (r"\boxed{1/0}", "1"),
    (r"\boxed{\frac{x-x}{0}}", "0"),
    ("The answer is 30% of 100.", "30"),
    (r"\boxed{3\%}", "0.3"),
]

UNREAD = {
    "": "a row of MATH without an answer",
    r"\$\dfrac23 \approx \$0.67": "two values",
    r"\begin{pmatrix} 1 & -1 \\ 1 & \phantom -1 \end{pmatrix}": "a blank that is measured by a sign",
    r"\frac{1}{7}\triangle ABC": "a share of a triangle",
}
"""References of MATH that are refused, with the reason."""
EQUAL: set[tuple[str, str]] = set()
"""Pairs that the draw makes, and that are equal."""


@pytest.mark.parametrize(("text", "answer"), RIGHT)
def test_right(text: str, answer: str) -> None:
    assert math.is_right(text, answer)


@pytest.mark.parametrize(("text", "answer"), WRONG)
def test_wrong(text: str, answer: str) -> None:
    assert not math.is_right(text, answer)


@given(st.integers(), st.integers())
def test_integers_are_compared_exactly(given_: int, answer: int) -> None:
    assert math.is_right(rf"\boxed{{{given_}}}", str(answer)) == (given_ == answer)
    assert math.is_right(rf"\boxed{{{answer:,}}}", str(answer))


@given(st.fractions(), st.integers(min_value=1, max_value=9))
def test_fractions_are_compared_exactly(answer: object, off: int) -> None:
    over, _, under = str(answer).partition("/")
    latex = rf"\frac{{{over}}}{{{under or 1}}}"
    assert math.is_right(rf"\boxed{{{latex}}}", str(answer))
    assert not math.is_right(rf"\boxed{{{latex}}}", f"{int(over) + off}/{under or 1}")


@given(
    st.text(
        alphabet=st.sampled_from(r"0123456789abx\{}()[]$^_,;:.=<>&|+-/*~ boxedfractextsqrt°²½－１") | st.characters()
    )
)
def test_any_text_has_a_verdict(text: str) -> None:
    assert math.is_right(text, "72") in (False, True)
    assert math.is_right(rf"\boxed{{{text}}}", "72") in (False, True)


HOSTILE = {
    "ten megabytes": "9" * 10_000_000,
    "many boxes": r"\boxed{3} " * 500_000,
    "open boxes": r"\boxed{" * 500_000,
    "nested boxes": r"\boxed{" * 200_000 + "}" * 200_000,
    "nested braces": r"\boxed{" + "{" * 900 + "5" + "}" * 900 + "}",
    "nested fractions": r"\boxed{" + r"\frac{1}{" * 150 + "2" + "}" * 150 + "}",
    "many answers": "the answer is " * 500_000,
    "many dollars": "$" * 1_000_000,
    "a long number": r"\boxed{" + "1" * 1_900 + "}",
    "marks on marks": "e" + "\u0301" * 1_000_000,
    "a huge exponent": r"\boxed{1e999999999}",
    "a huge power": r"\boxed{10^{999999999}}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_answers_are_wrong(kind: str) -> None:
    assert not math.is_right(HOSTILE[kind], "72")


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "$",
        r"1,2,\ldots,10",
        r"\frac{1}{7}\triangle ABC",
        r"5 \pmod{7}",
        r"f'(x)",
        r"\frac{1}{0}",
        "1 2",
        "9" * 3000,
        "√2 ≈ 1.41",
    ],
)
def test_a_reference_that_does_not_read_as_what_it_says_is_refused(answer: str) -> None:
    with pytest.raises(ValueError, match="cannot read the reference answer"):
        math.is_right("72", answer)


def gsm8k(name: str) -> list[str]:
    return [json.loads(line)["answer"] for line in (DATA / name).read_text().splitlines()]


def math_references() -> list[str]:
    files = ("math_train_7474.json", "math500.json")
    return sorted({str(row["answer"]) for file in files for row in json.loads((DATA / file).read_text())})


@needs_data
def test_gsm8k_solutions() -> None:
    solutions = gsm8k("gsm8k_test.jsonl")
    answers = [solution.rpartition("####")[2].strip() for solution in solutions]
    altered = [str(int(answer.replace(",", "")) + 1) for answer in answers]
    assert len(solutions) == 1319
    assert [a for s, a in zip(solutions, answers, strict=True) if not math.is_right(s, a)] == []
    assert [a for s, a in zip(solutions, altered, strict=True) if math.is_right(s, a)] == []


@needs_data
@pytest.mark.slow
def test_every_reference_is_right_against_itself() -> None:
    answers = [
        a.rpartition("####")[2].strip() for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl") for a in gsm8k(name)
    ]
    failed = set()
    for answer in {*answers, *math_references()}:
        try:
            texts = rf"Thus $\boxed{{{answer}}}$.", f"The answer is ${answer.strip()}$."
            right = [math.is_right(text, answer) for text in texts]
        except ValueError:
            right = []
        if right != [True, True]:
            failed.add(answer)
    assert failed == UNREAD.keys()


@needs_data
@pytest.mark.slow
def test_ten_thousand_wrong_answers() -> None:
    """Another reference in place of the right one, or the right one with one digit changed."""
    rng, references = random.Random(0), sorted(set(math_references()) - UNREAD.keys())
    pairs = []
    while len(pairs) < 10_000:
        answer, other = rng.choice(references), rng.choice(references)
        if len(pairs) % 2:
            digits = [match.start() for match in re.finditer(r"\d", answer)]
            if not digits:
                continue
            place = rng.choice(digits)
            other = answer[:place] + rng.choice("0123456789".replace(answer[place], "")) + answer[place + 1 :]
        if other != answer:
            pairs.append((answer, other))
    passed = [(a, b) for a, b in pairs if math.is_right(rf"Thus $\boxed{{{b}}}$.", a)]
    assert set(passed) <= EQUAL
