"""What every kind of task provides. A new kind is one class here in `qarl/tasks` and one line in its registry.

A question is the problem itself, without the text that the task's template puts around it.
"""

from __future__ import annotations

import hashlib
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from qarl.config.task import TaskConfig, TemplateConfig
from qarl.errors import ConfigError, DataError
from qarl.model_folder import reading
from qarl.tasks.text import words
from qarl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Log = Callable[[str], None]
"""Takes one line for the terminal."""
Turn = tuple[str, str]
"""Role and content of a chat message."""
Encode = Callable[..., Sequence[int]]
"""Called with a prompt's text, and with the turns before it where there are any. Returns token ids, those of the chat
template and special tokens included."""
NOTHING = re.compile("(?!)")
"""Matches no text."""


class Teacher(Protocol):
    """Demonstrates a task, with mistakes."""

    settings: dict[str, Any]
    """What its demonstrations depend on, ready for JSON."""

    def demonstrations(self, n: int, swap_prob: float, rng: random.Random) -> list[tuple[str, str]]:
        """`n` pairs of prompt text and answer, never of a held-out problem."""
        ...

    def answer(self, right: str, swap_prob: float, rng: random.Random) -> str:
        """The teacher's answer to a problem whose right answer is `right`."""
        ...


def with_mistakes(right: str, swap_prob: float, rng: random.Random) -> str:
    """`right` in which, from the left, each neighbouring pair of characters is swapped with `swap_prob`."""
    chars = list(right)
    for i in range(len(chars) - 1):
        if rng.random() < swap_prob:
            chars[i], chars[i + 1] = chars[i + 1], chars[i]
    return "".join(chars)


class PromptsTeacher:
    """Shows the answers of prompts, with mistakes: what a task without a teacher of its own demonstrates.

    Args:
        prompts: training prompts, of which each demonstration is one at random.
    """

    answer = staticmethod(with_mistakes)

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = prompts
        pairs = repr([(prompt.text, prompt.answer) for prompt in prompts])
        self.settings = {"demonstrations": hashlib.sha1(pairs.encode(), usedforsecurity=False).hexdigest()}

    def demonstrations(self, n: int, swap_prob: float, rng: random.Random) -> list[tuple[str, str]]:
        chosen = rng.choices(self._prompts, k=n)
        return [(prompt.text, self.answer(prompt.answer, swap_prob, rng)) for prompt in chosen]


class Task(ABC):
    """The problems of a run.

    Attributes:
        encode: makes the token ids of a prompt's text.
        solve: the program that answers every well-formed question, or None.
        teacher: makes demonstrations for a warm start, or None.
    """

    solve: Callable[[str], str] | None = None
    teacher: Teacher | None = None

    def __init__(self, encode: Encode) -> None:
        self.encode = encode

    @abstractmethod
    def load(self, seed: int, num_heldout: int, log: Log) -> tuple[list[Prompt], list[Prompt]]:
        """Training prompts and up to `num_heldout` held-out prompts, disjoint, with ids that are stable across runs.

        Every prefix of the held-out prompts is spread over their sets and levels as evenly as the data allows.

        Args:
            seed: which problems are generated, or in which order held-out rows are taken.
            num_heldout: held-out prompts requested; `log` gets a line when there are fewer.

        Raises:
            DataError: a data file or row is wrong.
            ConfigError: one of the splits has no problem.
        """

    @abstractmethod
    def prompt(self, question: str, answer: str, level: int) -> Prompt:
        """A prompt whose id depends on the question alone."""

    @abstractmethod
    def question(self, prompt: Prompt) -> str:
        """The question of `prompt`."""

    @abstractmethod
    def is_well_formed(self, question: str) -> bool:
        """Whether a text that the policy wrote is a question of this task."""

    def is_heldout(self, question: str) -> bool:
        """Whether the task's own rule keeps this question for evaluation."""
        return False

    def heldout_questions(self) -> Iterable[str]:
        """All questions kept for evaluation, if the task has a list of them; empty if a rule decides."""
        return ()


class TemplateTask(Task):
    """A task whose prompts are a question within the template of its config.

    Args:
        special: finds the special tokens that no question may hold.

    Raises ConfigError unless the template has `{question}` once.
    """

    def __init__(self, config: TemplateConfig, encode: Encode, special: re.Pattern[str] = NOTHING) -> None:
        super().__init__(encode)
        self._chat, self._special = config.chat, special
        self._before, self._after = split_template(config.prompt_template)

    def prompt(self, question: str, answer: str, level: int) -> Prompt:
        return self._prompt("row", question, answer, level)

    def _prompt(
        self,
        prefix: str,
        question: str,
        answer: str,
        level: int,
        turns: Sequence[Turn] = (),
        where: str = "",
        **fields: Any,
    ) -> Prompt:
        """`where` names the row, `fields` are further ones of the prompt.

        Raises DataError: a text holds a special token, or there are turns but no chat.
        """
        for content in (question, *(content for _, content in turns)):
            if found := self._special.search(content):
                what = f"the question '{' '.join(content.split()):.60}' holds the special token '{found[0]}'"
                raise DataError(f"{what}, which would end or begin turns", where, "remove it from the data")
        if turns and not self._chat:
            raise DataError("the prompt has several turns, which need a chat template", where, "set task.chat=true")
        text = f"{self._before}{question}{self._after}"
        ids = self.encode(text, turns) if turns else self.encode(text)
        spoken = [content for role, content in turns if role != "system"]
        digest = hashlib.sha1("\n".join([*spoken, question]).encode(), usedforsecurity=False).hexdigest()
        return Prompt(f"{prefix}/{digest}", text, answer, tuple(ids), level, **fields)

    def question(self, prompt: Prompt) -> str:
        return prompt.text.removeprefix(self._before).removesuffix(self._after)

    def is_well_formed(self, question: str) -> bool:
        return bool(words(question)) and not self._special.search(question)


def encoder(tokenizer: PreTrainedTokenizerBase, config: TaskConfig) -> Encode:
    """Encodes a prompt's text; with `chat`, as a user turn after the given ones. A system turn among these takes the
    place of the config's.

    Raises ConfigError without a chat template; encoding raises ModelError where the template refuses a turn.
    """
    if not config.chat:
        return tokenizer.encode
    if not tokenizer.chat_template:
        raise ConfigError("the tokenizer has no chat template", "task.chat", "set task.chat=false")
    system = () if config.system_prompt is None else (("system", config.system_prompt),)
    kwargs = {**config.chat_template_kwargs, "add_generation_prompt": True, "return_dict": False}

    def encode(text: str, turns: Sequence[Turn] = ()) -> list[int]:
        before = () if turns and turns[0][0] == "system" else system
        messages = [{"role": role, "content": content} for role, content in (*before, *turns, ("user", text))]
        with reading(Path(tokenizer.name_or_path), "chat template"):  # a template may raise anything
            ids: list[int] = tokenizer.apply_chat_template(messages, **kwargs)
        return ids

    return encode


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds the special tokens of `tokenizer` in a text, the longest first."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True)))) if special else NOTHING


def split_template(template: str) -> tuple[str, str]:
    """What stands before and after `{question}`. Raises ConfigError unless it occurs once."""
    before, found, after = template.partition("{question}")
    if not found or "{question}" in after:
        raise ConfigError("'{question}' does not occur in it once", "task.prompt_template", "write it once")
    return before, after


def shares(total: float, weights: Sequence[float]) -> list[int]:
    """`total` in parts that are proportional to `weights`, rounded."""
    return [round(total * weight / sum(weights)) for weight in weights]


def log_shortage(split: str, found: int, requested: int, log: Log) -> None:
    """Log a line when there are fewer prompts than requested."""
    if found < requested:
        log(f"only {found} of {requested} {split} prompts exist")


def take_evenly(streams: Iterable[Iterator[T]], n: int) -> list[T]:
    """Up to `n` items, one from each stream in turn; streams that end drop out."""
    return list(islice(_in_turn(list(streams)), n))


def _in_turn(streams: list[Iterator[T]]) -> Iterator[T]:
    while streams:
        alive = []
        for stream in streams:
            for item in islice(stream, 1):  # none when the stream has ended
                alive.append(stream)
                yield item
        streams = alive
