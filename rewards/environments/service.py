"""Environments in processes of their own, behind a time-out: none can stop, crash or slow down a run."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qarl.config.environment import EnvironmentConfig
from qarl.errors import ConfigError, QarlError, how_ended
from qarl.logs import log_file
from qarl.trace import span
from qarl.types import Activity, EnvironmentTurn, Prompt, Sample, Score
from rewards.process import ChildProcess, ChildProcesses

HERE = Path(__file__).parent
BUILT_IN = {
    "calculator": f"{HERE / 'calculator.py'}:Calculator",
    "guess": f"{HERE / 'guess.py'}:Guess",
    "verifiers": f"{HERE / 'from_verifiers.py'}:Verifiers",
}
Call = Mapping[str, Any]


class EnvironmentService(ChildProcesses["_Child"]):
    """`qarl.protocols.Environments` over `config.num_workers` processes. Not for concurrent callers.

    Process i has the environments of conversations i, i + n, i + 2n, ... of n processes. One that hangs in a call is
    killed after `config.timeout_s`; one that dies is replaced. Its conversation ends with reward 0, and `on_fault` gets
    a line. The other conversations of that process go on: their environments are made anew and told once more what they
    had been told, so an environment must answer equal calls equally.

    Raises ConfigError: a process cannot start.
    """

    def __init__(self, config: EnvironmentConfig, on_fault: Callable[[str], None], log_dir: Path | None = None) -> None:
        self._config, self._on_fault, self._log_dir = config, on_fault, log_dir
        self._prompts: dict[int, Prompt] = {}
        self._calls: dict[int, list[Call]] = {}
        self._homes: dict[int, _Child] = {}
        super().__init__(config.num_workers)

    def reset(self, prompts: Mapping[int, Prompt]) -> dict[int, EnvironmentTurn]:
        """Begin one conversation for each prompt, under its number."""
        self._prompts |= prompts
        return self._ask({i: {"do": "reset", "id": i, "prompt": _plain(prompt)} for i, prompt in prompts.items()})

    def step(self, responses: Mapping[int, str]) -> dict[int, EnvironmentTurn]:
        """What follows on a response in each of these conversations."""
        return self._ask({i: {"do": "step", "id": i, "response": text} for i, text in responses.items()})

    def end(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            del self._prompts[number], self._calls[number]
            with contextlib.suppress(_FaultError):  # it is over anyway
                self._homes.pop(number).tell({"do": "end", "id": number})

    def try_reset(self, prompt: Prompt) -> None:
        """Begin and end a conversation on `prompt`. Raises ConfigError: that cannot be done."""
        child = self._alive(0)
        try:
            _checked(child.ask({"do": "reset", "id": 0, "prompt": _plain(prompt)}))
            child.tell({"do": "end", "id": 0})
        except _FaultError as fault:
            tried = f"tried with the row '{' '.join(prompt.text.split())[:60]}'"
            raise ConfigError(f"cannot begin a conversation: it {fault}", "environment", tried) from fault

    @span("environments/turn")
    def _ask(self, calls: Mapping[int, Call]) -> dict[int, EnvironmentTurn]:
        """Answers in the order of `calls`; processes work side by side, each on one call at a time."""
        if not self._children:
            raise QarlError("the environment service is closed")
        slots = range(len(self._children))
        shares = [[number for number in calls if number % len(slots) == slot] for slot in slots]
        self._is_interrupted = False
        with ThreadPoolExecutor(len(slots)) as threads, contextlib.ExitStack() as stack:
            stack.callback(self._interrupt)  # at Ctrl-C, or when a process cannot start: the threads must end soon
            parts = list(threads.map(lambda share: self._serve(share, calls), shares))
            stack.pop_all()
        answers = {number: turn for part in parts for number, turn in part.items()}
        return {number: answers[number] for number in calls}

    def _interrupt(self) -> None:
        self._is_interrupted = True
        for child in self._children:
            child.end()

    def _serve(self, share: Sequence[int], calls: Mapping[int, Call]) -> dict[int, EnvironmentTurn]:
        """The answers of one process, one after the other."""
        return {number: self._turn(number, calls[number]) for number in share if not self._is_interrupted}

    def _turn(self, number: int, call: Call) -> EnvironmentTurn:
        try:
            turn = _checked(self._told(number, call))
        except _FaultError as fault:
            turn = EnvironmentTurn(error=str(fault))
        if turn.error and not self._is_interrupted:
            self._on_fault(f"prompt {self._prompts[number].id}: environment {turn.error}; the sample gets reward 0")
        return turn

    def _told(self, number: int, call: Call) -> Mapping[str, Any]:
        """The answer to `call`, after everything that this conversation's environment has to be told once more."""
        child = self._alive(number % len(self._children))
        earlier = self._calls.setdefault(number, [])
        again = earlier if self._homes.get(number) not in (None, child) else []
        self._homes[number] = child
        for told in again:
            child.ask(told)
        earlier.append(call)
        return child.ask(call)

    def _alive(self, slot: int) -> "_Child":
        child = self._children[slot]
        if child.connection.closed or child.process.poll() is not None:
            return self._replace(slot)
        return child

    def _start(self, slot: int) -> "_Child":
        return _Child(self._config, log_file(self._log_dir, "environment", slot))


class EnvironmentRewards:
    """`qarl.protocols.RewardService` of samples that an environment has scored; `close` ends the environments."""

    def __init__(self, environments: EnvironmentService) -> None:
        self.environments = environments

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        return [sample.score or Score(0.0, "no environment has scored the sample") for sample in samples]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ConfigError: the environment cannot be made, or not begin a conversation on the first prompt."""
        self.environments.try_reset(prompts[0])

    def doing(self) -> list[Activity]:
        """Nothing: environments answer while workers sample."""
        return []

    def close(self) -> None:
        self.environments.close()


class _FaultError(Exception):
    """What costs a conversation its reward."""


class _Child(ChildProcess):
    """One process, which answers one call at a time."""

    def __init__(self, config: EnvironmentConfig, log: Path | None) -> None:
        function = config.function or BUILT_IN[config.kind]
        python = config.python or sys.executable
        command = [python, str(HERE / "child.py"), function, json.dumps(config.settings), str(config.timeout_s)]
        env = dict(os.environ)
        if config.python is None:
            env["PYTHONPATH"] = os.pathsep.join(sys.path)
        else:
            env.pop("PYTHONPATH", None)  # our packages are not for that interpreter
        super().__init__(command, "environment", config.function or f"environment.kind {config.kind}", log, env)
        self._timeout_s = config.timeout_s

    def tell(self, call: Call) -> None:
        try:
            self.connection.send_bytes(json.dumps(call).encode())
        except OSError as error:
            raise _FaultError(f"process {how_ended(self.kill())}") from error

    def ask(self, call: Call) -> Mapping[str, Any]:
        self.tell(call)
        if not self.connection.poll(self._timeout_s):
            self.kill()
            raise _FaultError(f"timed out after {self._timeout_s} s")
        try:
            answer: Mapping[str, Any] = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise _FaultError(f"process {how_ended(self.kill())}") from error
        return answer


def _plain(prompt: Prompt) -> dict[str, Any]:
    """What an environment learns of a prompt."""
    return {
        "id": prompt.id,
        "text": prompt.text,
        "answer": prompt.answer,
        "level": prompt.level,
        "metadata": dict(prompt.metadata),
    }


def _checked(answer: Mapping[str, Any]) -> EnvironmentTurn:
    """The turn in a process's answer. Raises _FaultError."""
    if error := answer.get("error"):
        raise _FaultError(error)
    turn = EnvironmentTurn(answer["given"], answer.get("reward", 0.0), answer.get("done", False))
    if not isinstance(turn.given, str | list | dict | None):
        raise _FaultError(f"gave a {type(turn.given).__name__}, not a text, messages or token ids")
    if not math.isfinite(turn.reward):
        raise _FaultError(f"gave reward {turn.reward}")
    return turn
