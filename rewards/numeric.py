"""Numbers within a tolerance."""

from fractions import Fraction

from rewards.component import Component, Response
from rewards.math import answer_of, read_reference
from rewards.math_answer import Answer, Relation, Scalar


class Numeric(Component):
    """1.0 when the last number of the response lies within the tolerance of a right answer. It is found as by `math`,
    and a unit must agree where both have one."""

    def __init__(self, absolute: float, relative: float) -> None:
        self._absolute, self._relative = Fraction(absolute), Fraction(relative)

    def check(self, response: Response) -> None:
        for answer in response.answers:
            if _number(read_reference(answer)) is None:
                raise ValueError(f"the reference answer {answer[:200]!r} is no number")

    def judge(self, responses: list[Response]) -> list[float]:  # type: ignore[override]
        return [float(any(self._near(response.text, answer) for answer in response.answers)) for response in responses]

    def _near(self, text: str, answer: str) -> bool:
        reference, found = _number(read_reference(answer)), answer_of(text)
        given = _number(found) if found else None
        if reference is None or given is None or len({reference.unit, given.unit} - {""}) > 1:
            return False
        bound = max(self._absolute, self._relative * abs(reference.value))
        return bool(abs(given.value - reference.value) <= bound)


def _number(answer: Answer) -> Scalar | None:
    """The number that `answer` is, also as x = 5."""
    if isinstance(answer, Relation) and answer.named and len(answer.sides) == 2:
        answer = answer.sides[1]
    return answer if isinstance(answer, Scalar) and isinstance(answer.value, Fraction) else None
