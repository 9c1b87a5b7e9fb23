"""Environments of the package `verifiers` run unmodified, where QARL_VERIFIERS_PYTHON names a Python that has it."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from qarl.config.environment import EnvironmentConfig
from qarl.types import EnvironmentTurn, Prompt
from rewards.environments.service import HERE, EnvironmentService

PYTHON = os.environ.get("QARL_VERIFIERS_PYTHON", "")
ENVIRONMENTS = """
import verifiers as vf
from datasets import Dataset
from verifiers.envs.integrations.reasoninggym_env import ReasoningGymEnv


def add(a: int, b: int) -> int:
    '''Add two numbers.

    Args:
        a: one
        b: another
    '''
    return a + b


def right(completion, answer):
    return float(completion[-1]["content"].strip() == answer)


def load_environment(which, **settings):
    if which == "gym":
        return ReasoningGymEnv(gym="chain_sum", num_train_examples=3, num_eval_examples=2, **settings)
    rows = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"{i} + 3?"}], "answer": str(i + 3)} for i in range(3)]
    )
    return vf.ToolEnv(dataset=rows, eval_dataset=rows, rubric=vf.Rubric(funcs=[right]), tools=[add], **settings)
"""


def with_verifiers(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that needs the package."""
    skip = pytest.mark.skipif(not PYTHON, reason="QARL_VERIFIERS_PYTHON names no Python that has verifiers")
    return pytest.mark.slow(skip(test))


def test_a_version_with_the_new_api_alone_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    newest = ModuleType("verifiers")
    newest.__version__ = "0.4.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "verifiers", newest)
    with pytest.raises(ImportError, match=r"verifiers 0\.4\.0 has the API v1 alone.*install verifiers<0\.4"):
        runpy.run_path(str(HERE / "from_verifiers.py"))


def start(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: object) -> tuple[EnvironmentService, list[Prompt]]:
    """The service of an environment, and its training prompts."""
    (folder / "my_verifiers_env.py").write_text(ENVIRONMENTS)
    monkeypatch.chdir(folder)
    script = [PYTHON, str(HERE / "from_verifiers.py"), "my_verifiers_env", json.dumps(settings), "t.jsonl", "h.jsonl"]
    subprocess.run(script, check=True, timeout=240)
    rows = [json.loads(line) for line in (folder / "t.jsonl").read_text().splitlines()]
    prompts = [
        Prompt(str(i), row["question"], row["answer"], (1,), metadata={"example": row["example"]})
        for i, row in enumerate(rows)
    ]
    config = EnvironmentConfig(
        kind="verifiers", python=PYTHON, settings={"name": "my_verifiers_env", **settings}, timeout_s=60.0
    )
    return EnvironmentService(config, pytest.fail), prompts


@with_verifiers
def test_a_tool_is_called_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service, prompts = start(tmp_path, monkeypatch, which="tools", max_turns=4)
    with service:
        first, *_ = service.reset(dict(enumerate(prompts))).values()
        assert isinstance(first.given, dict)
        assert first.given["messages"] == [{"role": "user", "content": "0 + 3?"}]
        assert [tool["function"]["name"] for tool in first.given["tools"]] == ["add"]
        call = '<tool_call>{"name": "add", "arguments": {"a": 0, "b": 3}}</tool_call>'
        turns = service.step({0: call, 1: "4", 2: '<tool_call>{"name": "no"}</tool_call>'})
        assert turns[0] == EnvironmentTurn([{"role": "tool", "tool_call_id": "0", "content": "3"}])
        assert turns[1] == EnvironmentTurn(None, 1.0, done=True)
        assert not turns[2].done
        assert service.step({0: "3", 2: "7"}) == {
            0: EnvironmentTurn(None, 1.0, done=True),
            2: EnvironmentTurn(None, 0.0, done=True),
        }


@with_verifiers
def test_a_shipped_environment_scores_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service, prompts = start(tmp_path, monkeypatch, which="gym")
    with service:
        first, *_ = service.reset(dict(enumerate(prompts))).values()
        assert isinstance(first.given, dict)
        question = first.given["messages"][-1]["content"].partition("problem: ")[2].rstrip("= ")
        turns = service.step({0: f"<answer>{eval(question)}</answer>", 1: "<answer>none</answer>"})
        assert turns[0] == EnvironmentTurn(None, 1.0, done=True)
        assert turns[1].done
        assert turns[1].reward < 0.1
