"""Environments run in processes of their own; whatever one does costs its conversation and no other."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from qarl.config.environment import EnvironmentConfig
from qarl.errors import ConfigError, QarlError
from qarl.types import EnvironmentTurn, Prompt, Sample, Score
from rewards.environments.service import EnvironmentRewards, EnvironmentService

TOY = """
import os, sys, time

print("noise")

class Toy:
    def __init__(self, last="bye"):
        self.heard, self.last = [], last

    def reset(self, prompt):
        self.heard.append(prompt["text"])
        return prompt["metadata"].get("given")

    def step(self, response):
        self.heard.append(response)
        if response == "hang":
            time.sleep(1000)
        if response == "die":
            os._exit(3)
        if response == "raise":
            raise ValueError("two\\nlines")
        if response == "nan":
            return "", float("nan"), False
        if response == "object":
            return object(), 0.0, False
        if response == "pid":
            return str(os.getpid()), 0.0, False
        if response == "modules":
            return str("numpy" in sys.modules), 0.0, False
        return "|".join(self.heard), 0.25, response == self.last

def broken(**settings):
    raise AssertionError

raise_at_import = None
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("environments") / "toy.py"
    file.write_text(TOY)
    return f"{file}:Toy"


@pytest.fixture(scope="module")
def faults() -> list[str]:
    return []


@pytest.fixture(scope="module")
def shared(toy: str, faults: list[str]) -> Iterator[EnvironmentService]:
    config = EnvironmentConfig(kind="custom", function=toy, timeout_s=2.0, num_workers=2)
    with EnvironmentService(config, faults.append) as made:
        yield made


@pytest.fixture
def service(shared: EnvironmentService) -> Iterator[EnvironmentService]:
    yield shared
    shared.end(list(shared._homes))


def prompts(count: int) -> dict[int, Prompt]:
    return {i: Prompt(f"p{i}", f"text{i}", "", (1,)) for i in range(count)}


def test_each_conversation_has_an_environment_of_its_own(service: EnvironmentService) -> None:
    given = Prompt("q", "t", "", (1,), metadata={"given": [{"role": "user", "content": "hi"}]})
    first = service.reset({**prompts(3), 7: given})
    assert first == {
        **dict.fromkeys(range(3), EnvironmentTurn()),
        7: EnvironmentTurn([{"role": "user", "content": "hi"}]),
    }
    assert service.step({2: "a", 0: "b"}) == {2: EnvironmentTurn("text2|a", 0.25), 0: EnvironmentTurn("text0|b", 0.25)}
    assert service.step({0: "bye"}) == {0: EnvironmentTurn("text0|b|bye", 0.25, done=True)}
    service.end([0])
    service.reset(prompts(1))
    assert service.step({0: "c", 2: "d"}) == {
        0: EnvironmentTurn("text0|c", 0.25),
        2: EnvironmentTurn("text2|a|d", 0.25),
    }


@pytest.mark.parametrize(
    ("response", "error"),
    [
        ("raise", "raised ValueError: two lines"),
        ("nan", "gave reward nan"),
        ("object", "raised TypeError: Object of type object is not JSON serializable"),
        ("die", "process exited with code 3"),
        ("hang", "timed out after 2.0 s"),
    ],
)
def test_a_failure_costs_its_conversation_alone(
    service: EnvironmentService, faults: list[str], response: str, error: str
) -> None:
    service.reset(prompts(4))
    service.step({0: "a", 1: "a", 2: "a"})
    faults.clear()
    turns = service.step({0: response, 1: "b", 2: "b"})
    assert turns[0] == EnvironmentTurn(error=error)
    assert [turns[1].given, turns[2].given] == ["text1|a|b", "text2|a|b"]  # 2 lives in the process of 0
    assert faults == [f"prompt p0: environment {error}; the sample gets reward 0"]
    assert service.step({2: "c"})[2].given == "text2|a|b|c"


def test_a_process_killed_from_outside_is_replaced(service: EnvironmentService) -> None:
    service.reset(prompts(2))
    os.kill(int(str(service.step({1: "pid"})[1].given)), 9)
    service._children[1].process.wait()
    assert service.step({1: "a"})[1].given == "text1|pid|a"


def test_another_interpreter_runs_it_without_our_packages(toy: str, tmp_path: Path) -> None:
    config = EnvironmentConfig(kind="custom", function=toy, python=sys.executable, settings={"last": "a"})
    with EnvironmentService(config, pytest.fail, tmp_path) as service:
        service.reset(prompts(1))
        assert service.step({0: "modules"})[0].given == "False"
        assert service.step({0: "a"})[0].done
    assert (tmp_path / "environment-0.log").read_text() == "noise\n"


def test_an_interruption_does_not_wait_for_the_calls(toy: str) -> None:
    """The fault of the first conversation interrupts, as Ctrl-C would; the others of its process would hang."""

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    config = EnvironmentConfig(kind="custom", function=toy, timeout_s=50.0)
    with EnvironmentService(config, interrupt) as service:
        service.reset(prompts(3))
        with pytest.raises(KeyboardInterrupt):
            service.step({0: "raise", 1: "hang", 2: "hang"})
        assert service.reset({3: prompts(1)[0]}) == {3: EnvironmentTurn()}  # a new process


def test_what_cannot_start_says_why(toy: str, tmp_path: Path) -> None:
    missing = toy.replace(":Toy", ":Nothing")
    with pytest.raises(QarlError, match="environment process could not start: AttributeError"):
        EnvironmentService(EnvironmentConfig(kind="custom", function=missing), pytest.fail)


def test_rewards_are_those_of_the_samples(service: EnvironmentService) -> None:
    sample = Sample(Prompt("p", "", "", (1,)), (2,), None, "", "stop", 0, score=Score(0.5))  # type: ignore[arg-type]
    assert EnvironmentRewards(service).score([sample]) == [Score(0.5)]


@pytest.mark.parametrize(
    ("settings", "given", "error"),
    [
        ({"lats": "a"}, None, "raised TypeError: .* unexpected keyword argument 'lats'"),
        ({}, 3, "gave a int, not a text"),
    ],
)
def test_a_conversation_that_cannot_begin_is_told_before_a_run(
    toy: str, settings: dict[str, str], given: object, error: str
) -> None:
    config = EnvironmentConfig(kind="custom", function=toy, settings=settings)
    prompt = Prompt("p", "12=", "", (1,), metadata={"given": given})
    refused = pytest.raises(ConfigError, match=f"cannot begin a conversation: it {error}.*row '12='")
    with closing(EnvironmentRewards(EnvironmentService(config, pytest.fail))) as rewards, refused:
        rewards.check([prompt])
