"""The scorers of reasoning-gym's generators."""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from reasoning_gym import create_dataset

from rewards.component import Response


def reasoning_gym(response: Response) -> float:
    """What the generator of the row gives for the response, in [0, 1]."""
    return verify(response.text, response.finish_reason, response.answer, **response.row)


def verify(
    text: str,
    finish_reason: str,
    answer: str,
    *,
    dataset: str,
    settings: Mapping[str, Any],
    entry: Mapping[str, Any],
    answer_pattern: str,
) -> float:
    """What the generator `dataset` gives for the answer in `text`, in [0, 1]; many give a part for a near miss.

    An answer that was given counts, whatever `finish_reason` says.

    Args:
        settings: of the generator.
        entry: the problem; its own answer decides, not `answer`.
        answer_pattern: see `find_answer`.
    """
    return float(_scorer(dataset, json.dumps(settings))(find_answer(text, answer_pattern), entry))


def find_answer(text: str, pattern: str) -> str | None:
    """The last match of `pattern` in `text`, or that match's group; `text` without white space around it when `pattern`
    is empty; None when nothing matches."""
    if not pattern:
        return text.strip()
    matches = re.findall(pattern, text)
    return matches[-1].strip() if matches else None


@lru_cache
def _scorer(dataset: str, settings: str) -> Any:
    return create_dataset(dataset, **json.loads(settings), seed=0, size=1).score_answer
