"""Keys of the environment that answers the policy between its turns."""

from collections.abc import Iterator
from typing import Any, Literal

from qarl.config.base import Node, PathText, PositiveInt, Seconds


class EnvironmentConfig(Node):
    kind: Literal["none", "calculator", "guess", "verifiers", "custom"] = "none"
    """`none`: the policy answers once and `reward` judges it. `calculator`: a tool. `guess`: guess a number. These two
    are examples. `verifiers`: an environment of that package. `custom`: `environment.function`. With an environment the
    reward is the environment's."""
    function: str | None = None
    """What makes a custom environment, `(**settings) -> environment`: `module:name` or `path/to/file.py:name`."""
    settings: dict[str, Any] = {}
    """Keyword arguments of the environment."""
    python: PathText | None = None
    """Interpreter of the environment's processes, for example `/path/to/venv/bin/python`; null is this one."""
    max_turns: PositiveInt = 4
    """Most turns of the policy in one conversation; `rollout.sampling.max_new_tokens` is the longest of one turn, and
    `rollout.max_model_len` holds the whole conversation."""
    num_workers: PositiveInt = 1
    """Environment processes; each has the environments of many conversations."""
    timeout_s: Seconds = 30.0
    """An environment that takes longer for one call is killed; the sample gets reward 0 and a line is logged."""

    def contradictions(self) -> Iterator[str]:
        if (self.kind == "custom") != (self.function is not None):
            yield "environment.function: `environment.kind: custom` needs it, and no other kind takes it"
        if self.kind == "none" and (self.settings or self.python):
            yield "environment.kind: none takes no settings and no python"
