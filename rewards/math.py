"""Mathematical answers: which part of a response is the answer, and whether it equals the reference.

A wrong answer that passes is worse than a right one that does not: nothing counts as equal by rounding, by conversion
of units or because a part of it was left out. docs/rewards.md has the rules in words.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from rewards.component import Component, Response
from rewards.math_answer import Answer, Group, Relation, Scalar, Words, read

TAIL = 2000
"""Characters at the end of a response without a box in which its answer is looked for."""
MOST_BOXES = 20
"""Boxes side by side that make one answer."""
BOX = re.compile(r"\\(?:boxed|fbox)\s*")
BETWEEN = re.compile(r"(?:[\s,;.$&]|\\[()\[\],; ]|\\q?quad|and|or|\\text\s*\{\s*(?:and|or)\s*\})*")
"""What may stand between boxes that make one answer."""
PHRASE = re.compile(
    r"answers?(?:\*\*)?(?:[^\n.:=]{0,60}?(?:\bis|\bare|:|=)+|:)(?:\*\*)?:?\s*(?P<rest>[^\n]+)", re.IGNORECASE
)
PIECE = re.compile(
    r"\$\$.+?\$\$|\$[^$\n]+\$|\\\(.+?\\\)|\\\[.+?\\\]"
    r"|(?<![\w.])-?[$€£¥]?"
    r"(?:\d+ \d+/\d+|(?:\d[\d,]*(?:\{,\}\d{3})*)?(?:\.?\d+)(?:[eE][-+]?\d+)?(?:\s?/\s?\d+)?)\s?\\?%?",
    re.DOTALL,
)
"""A formula between delimiters, or a plain number."""
FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


class Math(Component):
    """1.0 when the answer of a response equals a right one, else 0.0, also when it cannot be read or was cut off after
    it. Some expressions take forever, such as a tower of powers: the caller must limit the time."""

    def start(self) -> None:
        read(r"\frac{1}{2} + \sqrt{x}")  # imports the grammar and builds its tables

    def check(self, response: Response) -> None:
        for answer in response.answers:
            read_reference(answer)

    def judge(self, responses: Sequence[Response]) -> Sequence[float]:
        return [float(any(is_right(response.text, answer) for answer in response.answers)) for response in responses]


def is_right(text: str, answer: str) -> bool:
    """Whether the answer of the response `text` equals `answer`: plain ("72"), LaTeX with or without delimiters, or the
    solution of a GSM8K row. Raises ValueError: `answer` cannot be read."""
    reference = read_reference(answer)
    if text.strip() == answer.strip():
        return True
    given = answer_of(text)
    return given is not None and equal(reference, given)


def read_reference(answer: str) -> Answer:
    """What a row's answer means. Raises ValueError, with the reason, when a part of it has no meaning."""
    try:
        return read(_after_mark(answer) or _boxed(answer) or answer)
    except ValueError as error:
        raise ValueError(f"cannot read the reference answer {answer[:200]!r}: {error}") from error


def answer_of(text: str) -> Answer | None:
    """The answer of a response; None when there is none that can be read."""
    for candidate in candidates(text):
        with contextlib.suppress(ValueError):
            return read(candidate)
    return None


def candidates(text: str) -> Iterator[str]:
    """Where the answer of a response may stand; the first that can be read counts.

    With a box: the last box alone, and with it the boxes just before it when nothing but separators is between. An
    unfinished last box is no answer. Without a box: what follows `####` on the last line; the whole of a short text;
    what follows the last "answer is"; the last number or formula.
    """
    if BOX.search(text):
        if (boxed := _boxed(text)) is not None:
            yield boxed
        return
    if (marked := _after_mark(text)) is not None:
        yield marked
        return
    tail = text[-TAIL:]
    if len(text) <= TAIL and not re.search(r"(?<![\\a-zA-Z])[A-Za-z]{2,}[^A-Za-z}]", text.strip()):
        yield text
    if phrases := list(PHRASE.finditer(tail)):
        yield re.split(r"[.!?](?=\s|$)|\*\*", phrases[-1]["rest"])[0]
        tail = phrases[-1]["rest"]
    if pieces := PIECE.findall(tail):
        yield pieces[-1]


def _after_mark(text: str) -> str | None:
    """What follows `####`, the mark of GSM8K, on the last line."""
    last_line = text.rstrip().rpartition("\n")[2]
    return last_line.removeprefix("####") if last_line.startswith("####") else None


def _boxed(text: str) -> str | None:
    """The content of the last box, and of those that belong to it, as a list; None when it is unfinished or missing."""
    found: list[str] = []
    end = len(text)
    while (start := max(text.rfind(r"\boxed", 0, end), text.rfind(r"\fbox", 0, end))) >= 0:
        box = BOX.match(text, start)
        close = _closing(text, box.end(), end) if box else -1
        if close < 0 or (found and not BETWEEN.fullmatch(text, close + 1, end)):
            break
        if len(found) == MOST_BOXES:
            return None
        found.insert(0, text[box.end() + 1 : close])  # type: ignore[union-attr]
        end = start
    return ", ".join(dict.fromkeys(found)) if found else None


def _closing(text: str, start: int, end: int) -> int:
    """Where the brace that opens at `start` closes, before `end`; -1 when it does not."""
    depth = 0
    for brace in re.compile(r"\\.|[{}]|[^{}\\]+", re.DOTALL).finditer(text, start, end):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth <= 0:
            return brace.start() if brace[0] == "}" else -1
    return -1


def equal(reference: Answer, given: Answer) -> bool:
    """Whether both have the same structure, exactly the same values, and the same unit where both have one."""
    match reference, given:
        case Relation(), Relation():
            return _equal_relations(reference, given)
        case Relation(), _:
            return reference.named and all(equal(side, given) for side in reference.sides[1:])
        case _, Relation() if set(given.signs) == {"="}:
            return all(equal(reference, side) for side in given.sides[given.named :])
        case Scalar(), Scalar():
            return _equal_scalars(reference, given)
        case Words(), Words():
            return reference == given
        case Group(), Group():
            same = reference.brackets == given.brackets and len(reference.items) == len(given.items)
            return same and (_all_equal if reference.ordered else _matched)(reference.items, given.items)
    return False


def _all_equal(left: tuple[Answer, ...], right: tuple[Answer, ...]) -> bool:
    return len(left) == len(right) and all(map(equal, left, right))


def _matched(left: tuple[Answer, ...], right: tuple[Answer, ...]) -> bool:
    """Whether each answer has its equal on the other side, in any order. Equality is transitive, so greedy suffices."""
    rest = list(right)
    for answer in left:
        other = next((item for item in rest if equal(answer, item)), None)
        if other is None:
            return False
        rest.remove(other)
    return not rest


def _equal_relations(left: Relation, right: Relation) -> bool:
    if left.signs == right.signs and _all_equal(left.sides, right.sides):
        return True
    flipped = tuple(FLIPPED.get(sign, sign) for sign in reversed(right.signs))
    if left.signs == flipped and _all_equal(left.sides, tuple(reversed(right.sides))):
        return True
    return left.signs == right.signs == ("=",) and _proportional(_difference(left), _difference(right))


def _difference(equation: Relation) -> Any:
    """Left side minus right side; None unless both are formulas."""
    sides = [_formula_of(side) for side in equation.sides]
    return None if None in sides else sides[0] - sides[1]


def _formula_of(side: Answer) -> Any:
    import sympy

    if isinstance(side, Words):  # the y of y = 2 x
        return sympy.Symbol(side.text, real=True) if len(side.text) == 1 else None
    return _expression(side.value) if isinstance(side, Scalar) and not side.unit else None


def _proportional(left: Any, right: Any) -> bool:
    """Whether one is the other times a number: then both equations have the same solutions."""
    import sympy

    if left is None or right is None or not left.free_symbols or left.free_symbols != right.free_symbols:
        return False
    ratio = sympy.simplify(left / right)
    return bool(ratio.is_number and ratio.is_finite and ratio.is_nonzero)


def _equal_scalars(left: Scalar, right: Scalar) -> bool:
    units = {left.unit, right.unit} - {""}
    if len(units) > 1:
        return False
    if _equal_values(left.value, right.value):
        return True
    if left.unit == right.unit or units != {"%"}:
        return False
    percent, plain = (left, right) if left.unit else (right, left)
    return _equal_values(percent.value / 100, plain.value)  # 50% is 50, and 0.5


def _equal_values(left: Any, right: Any) -> bool:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    import sympy

    left, right = _expression(left), _expression(right)
    if left == right:
        return True
    if left.free_symbols != right.free_symbols or _differ_by_number(left, right):
        return False
    return sympy.simplify(left - right) == 0


def _expression(value: Any) -> Any:
    import sympy

    return sympy.Rational(value.numerator, value.denominator) if isinstance(value, Fraction) else value


def _differ_by_number(left: Any, right: Any) -> bool:
    """Whether values at one point show that the formulas differ, which is much faster than to simplify them."""
    import sympy

    symbols = sorted(left.free_symbols, key=str)
    point = {symbol: sympy.Rational(1000 + 37 * i, 1013 - 13 * i) for i, symbol in enumerate(symbols[:50])}
    a, b = left.subs(point).evalf(30), right.subs(point).evalf(30)
    if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
        return False
    return bool(abs(a - b) > sympy.Float("1e-12") * (abs(a) + abs(b)))
