"""Generated problems of reasoning-gym (https://github.com/open-thought/reasoning-gym), which also has their scorers."""

import difflib
import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from itertools import islice
from typing import Any

from qarl.config.task import GymDatasetConfig, ReasoningGymTaskConfig
from qarl.errors import ConfigError
from qarl.tasks.task import Encode, Log, Task, log_shortage, split_template, take_evenly
from qarl.tasks.text import plain
from qarl.types import Prompt

SEEDS = 2**30
"""Training problems have seeds below this number, held-out problems above. Problem i of seed s is that of s + i."""
DRAWS = 4
"""Problems drawn for each that is requested: many repeat themselves, or are held out."""
OWN_SETTINGS = {"seed", "size"}
"""Settings that are not the user's."""

Entry = dict[str, Any]
"""A problem as reasoning-gym has it: question, answer, metadata."""


class ReasoningGymTask(Task):
    """Raises ConfigError: no such generator or setting, a bad value, or a bad template."""

    def __init__(self, config: ReasoningGymTaskConfig, encode: Encode) -> None:
        super().__init__(encode)
        self._config = config
        self._before, self._after = split_template(config.prompt_template)
        for number, dataset in enumerate(config.datasets):
            _check(dataset, f"task.datasets[{number}]")

    def load(self, seed: int, num_heldout: int, log: Log) -> tuple[list[Prompt], list[Prompt]]:
        seen: set[str] = set()
        draws = DRAWS * num_heldout
        levels = range(1, len(self._config.datasets) + 1)
        heldout = take_evenly([self._prompts(level, SEEDS, draws, seed, seen) for level in levels], num_heldout)
        log_shortage("held-out", len(heldout), num_heldout, log)
        train: list[Prompt] = []
        for level, n in zip(levels, self._shares(), strict=True):
            found = list(islice(self._prompts(level, 0, DRAWS * n, seed, seen), n))
            log_shortage(f"level {level} training", len(found), n, log)
            train += found
        if not train:
            what = f"{len(heldout)} held-out problems leave none for training"
            raise ConfigError(what, "task.datasets", "widen their settings, or lower eval.final_num_prompts")
        return train, heldout

    def _shares(self) -> list[int]:
        """Training prompts of each generator, by weight."""
        weights = [dataset.weight for dataset in self._config.datasets]
        return [round(self._config.num_prompts * weight / sum(weights)) for weight in weights]

    def _prompts(self, level: int, first_seed: int, draws: int, seed: int, seen: set[str]) -> Iterator[Prompt]:
        """Those of `draws` problems of one generator whose questions are not in `seen`, which gets them."""
        dataset = self._config.datasets[level - 1]
        offset = random.Random(f"reasoning_gym/{seed}/{level}").randrange(SEEDS // 2)
        for entry in _entries(dataset, first_seed + offset, draws):
            key = plain(" ".join(entry["question"].split()))
            if key not in seen:
                seen.add(key)
                yield self._prompt(entry, level, dataset)

    def _prompt(self, entry: Entry, level: int, dataset: GymDatasetConfig) -> Prompt:
        prompt = self.prompt(entry["question"], str(entry["answer"]), level)
        scorer = {
            "dataset": dataset.name,
            "settings": dataset.settings,
            "entry": entry,
            "answer_pattern": self._config.answer_pattern,
        }
        return replace(prompt, verifier_kwargs=scorer)

    def prompt(self, question: str, answer: str, level: int) -> Prompt:
        text = f"{self._before}{question}{self._after}"
        name = self._config.datasets[level - 1].name
        digest = hashlib.sha1(question.encode(), usedforsecurity=False).hexdigest()
        return Prompt(f"{name}/{digest}", text, answer, tuple(self.encode(text)), level)

    def question(self, prompt: Prompt) -> str:
        return prompt.text.removeprefix(self._before).removesuffix(self._after)

    def is_well_formed(self, question: str) -> bool:
        """None of the policy's: the scorers know only problems that reasoning-gym made."""
        return False


def _entries(dataset: GymDatasetConfig, seed: int, n: int) -> Iterator[Entry]:
    """`n` problems, one after the other; problem i depends on `seed` + i."""
    from reasoning_gym import create_dataset  # late: it is slow to import

    yield from create_dataset(dataset.name, **dataset.settings, seed=seed, size=n)


def _check(dataset: GymDatasetConfig, where: str) -> None:
    from reasoning_gym.factory import DATASETS

    if dataset.name not in DATASETS:
        what = f"reasoning-gym has no generator '{dataset.name}'"
        raise ConfigError(what, f"{where}.name", _nearest(dataset.name, DATASETS))
    known = {field.name for field in fields(DATASETS[dataset.name][1])} - OWN_SETTINGS
    for setting in dataset.settings:
        if setting not in known:
            what = f"{dataset.name} has no setting '{setting}'"
            raise ConfigError(what, f"{where}.settings", _nearest(setting, known))
    try:
        next(_entries(dataset, 0, 1))
    except Exception as error:  # each generator checks its settings in its own way, mostly with assert
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{dataset.name} refuses them: {reason}", f"{where}.settings") from error


def _nearest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(names)}"
