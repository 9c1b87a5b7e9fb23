"""The letter of a multiple-choice question."""

import re

from rewards.component import Response
from rewards.math import BOX, PHRASE, candidates


def choice(response: Response, letters: str) -> float:
    """1.0 when the letter that the response chooses is a right answer; else 0.0, also when it chooses several."""
    right = {_only_letter(answer, letters) for answer in response.answers}
    return float(chosen(response.text, letters) in right - {None})


def chosen(text: str, letters: str) -> str | None:
    """The one letter in the last box, or behind the last "answer is"; without both, the last one in parentheses or
    alone on the last line; None without one."""
    places = list(candidates(text))
    if not BOX.search(text) and not PHRASE.search(text):
        places += [*re.findall(rf"\(([{letters}])\)", text)[-1:], text.rstrip().rpartition("\n")[2]]
    return next((letter for place in places if (letter := _only_letter(place, letters))), None)


def _only_letter(text: str, letters: str) -> str | None:
    """The letter in "B", "(B)", "\\text{B}", "B. Paris"; None when several or none stand alone."""
    plain = re.sub(r"\\text[a-z]*|\\math[a-z]*|\\boxed|[*_${}\\]", " ", text)
    first = re.match(rf"[\s(\[]*([{letters}])(?=[)\]:.]|\s*$)", plain)
    alone = set(re.findall(rf"(?<![\w'])([{letters}])(?![\w'])", plain))
    if first and not re.search(rf"\b(?:or|and|not)\b|,\s*[{letters}]\b", plain):
        return first[1]
    return alone.pop() if len(alone) == 1 and not re.search(r"\bnot\b|n't\b", plain) else None
