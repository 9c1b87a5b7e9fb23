"""The judge against a server of this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qarl.config.reward import JudgeSettings
from qarl.errors import ConfigError
from rewards import endpoint
from rewards.endpoint import Rejected, Unreachable
from rewards.judge import Judge
from tests.support.chat_server import Stub, completion, serving
from tests.support.rewards import response


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.01)
    with serving() as server:
        yield server


def judge_of(stub: Stub, **settings: Any) -> Judge:
    settings = {"template": "{response}", **settings}
    url = f"http://127.0.0.1:{stub.server_port}/v1"
    made = Judge(**JudgeSettings(base_url=url, model="big", **settings).model_dump())
    made.start()
    return made


def test_template_score_and_scale(stub: Stub) -> None:
    question = "the prompt of p / {answer} / 4"
    stub.plans = {question: [completion("Score: 3. No, wait. score = 7.5")]}
    judge = judge_of(stub, template="{prompt} / {response} / {answer}", lowest=5.0, highest=10.0)
    assert judge.judge([response("{answer}", "4")]) == [0.5]
    assert stub.bodies[0]["messages"] == [{"role": "user", "content": question}]
    assert stub.bodies[0]["temperature"] == 0.0


def test_scores_outside_the_scale_count_as_its_ends(stub: Stub) -> None:
    stub.plans = {"a": [completion("score 12")], "b": [completion("score -1")]}
    assert judge_of(stub).judge([response("a"), response("b")]) == [1.0, 0.0]


def test_what_passes_is_tried_again_and_what_fails_costs_one_response(stub: Stub) -> None:
    stub.plans = {"a": [503, completion("score 10")], "b": [400], "c": [completion("no idea")], "d": [503] * 3}
    rewards = judge_of(stub, max_retries=2).judge([response(text) for text in "abcd"])
    assert rewards[0] == 1.0
    assert [type(reward) for reward in rewards[1:]] == [Rejected, ValueError, Unreachable]


def test_replies_are_kept_across_processes(stub: Stub, tmp_path: Path) -> None:
    stub.plans = {"a": [completion("score 10")]}
    file = str(tmp_path / "replies.db")
    for _ in range(2):
        assert judge_of(stub, cache=file).judge([response("a")]) == [1.0]
    assert len(stub.bodies) == 1
    assert judge_of(stub, cache=file, max_tokens=9).judge([response("a")]) != [1.0]  # another request


def test_the_budget_counts_the_requests_of_all_processes(stub: Stub, tmp_path: Path) -> None:
    stub.plans = {text: [completion("score 10")] for text in "abc"}
    settings = {"cache": str(tmp_path / "replies.db"), "budget": 2}
    assert judge_of(stub, **settings).judge([response("a")]) == [1.0]
    rewards = judge_of(stub, **settings).judge([response("b"), response("b"), response("a")])
    assert rewards[2] == 1.0
    (late,) = judge_of(stub, **settings).judge([response("c")])
    assert "budget of 2 requests is spent" in str(late)
    assert len(stub.bodies) == 2


def test_nobody_there_is_told_at_the_start(stub: Stub) -> None:
    url = "http://127.0.0.1:9/v1"
    judge = Judge(**JudgeSettings(base_url=url, model="big", template="{response}").model_dump())
    with pytest.raises(ConfigError, match=r"nobody answers at 127\.0\.0\.1:9"):
        judge.start()
