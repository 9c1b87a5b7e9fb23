"""Functions of the user's own, in a folder outside of the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from qarl.config.reward import CustomSettings
from qarl.errors import ConfigError
from rewards.custom import Custom, check_function
from tests.support.rewards import response

FUNCTIONS = """
import asyncio

def plain(text, finish_reason, answer, factor=1):
    return factor * (text == answer)

def fields(text, finish_reason, answer, metadata, token_ids, source, extra=0):
    return metadata["level"] + len(token_ids) + (source == "s") + extra

running = 0
async def slow(text, finish_reason, answer):
    global running
    running += 1
    most = 0
    for _ in range(5):
        await asyncio.sleep(0)
        most = max(most, running)
    running -= 1
    if text == "bad":
        raise ValueError("bad")
    return most

def best(responses):
    longest = max(len(r.text) for r in responses)
    return [float(len(r.text) == longest) for r in responses]

async def batch(responses):
    return [float(len(responses))] * len(responses)
"""


def custom(folder: Path, name: str, **settings: Any) -> Custom:
    file = folder / "mine.py"
    file.write_text(FUNCTIONS)
    return Custom(**CustomSettings(function=f"{file}:{name}", **settings).model_dump())


def test_a_plain_function(tmp_path: Path) -> None:
    judge = custom(tmp_path, "plain", kwargs={"factor": -3})
    assert judge.judge([response("5", "5")]) == [-3]
    assert judge.judge([response("4", "5")]) == [0]


def test_a_function_that_cannot_be_called_is_told(tmp_path: Path) -> None:
    custom(tmp_path, "plain")
    file = tmp_path / "mine.py"
    check_function(f"{file}:fields", "reward.function", {}, "sample")
    check_function(f"{file}:best", "reward.function", {}, "group")
    with pytest.raises(ConfigError, match=r"^reward\.function: plain cannot be called as"):
        check_function(f"{file}:plain", "reward.function", {"power": 2}, "sample")
    with pytest.raises(ConfigError, match="best cannot be called"):
        check_function(f"{file}:best", "reward.function", {}, "sample")


def test_a_function_gets_the_fields_that_it_names_and_what_its_row_has(tmp_path: Path) -> None:
    judge = custom(tmp_path, "fields")
    assert judge.judge([response("", source="s", metadata={"level": 10}, token_ids=(1, 2, 3))]) == [14]
    assert judge.judge([response("", metadata={"level": 10}, row={"extra": 0.5})]) == [12.5]


def test_async_calls_run_at_the_same_time_and_fail_alone(tmp_path: Path) -> None:
    first, bad, last = custom(tmp_path, "slow").judge([response("a"), response("bad"), response("b")])
    assert (first, last) == (3, 3)
    assert isinstance(bad, ValueError)
    with pytest.raises(ValueError, match="bad"):
        custom(tmp_path, "slow").judge([response("bad")])


@pytest.mark.parametrize(("name", "rewards"), [("best", [0.0, 1.0]), ("batch", [2.0, 2.0])])
def test_a_function_of_several_responses(tmp_path: Path, name: str, rewards: list[float]) -> None:
    assert custom(tmp_path, name, scope="batch").judge([response("a"), response("bb")]) == rewards


def test_the_functions_of_the_page(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.py").write_text(block)

    def judged(name: str, **settings: Any) -> Any:
        function = f"{tmp_path / 'mine.py'}:{name}"
        responses = [response("12", "1234", token_ids=(1, 2, 3)), response("1", "1234", token_ids=(1,))]
        return Custom(**CustomSettings(function=function, **settings).model_dump()).judge(responses)

    assert judged("nearly", kwargs={"power": 2}) == [0.25, 0.0625]
    assert judged("shortest", scope="group") == [0.0, 1.0]
    assert judged("remote", at_once=32) == [2.0, 1.0]
