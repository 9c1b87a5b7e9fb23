"""Generated problems of reasoning-gym (https://github.com/open-thought/reasoning-gym), which also has their scorers."""

import difflib
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from itertools import islice
from typing import Any

from qarl.config.task import GymDatasetConfig, ReasoningGymTaskConfig
from qarl.errors import ConfigError
from qarl.tasks.task import NOTHING, Encode, Log, TemplateTask, log_shortage, shares, take_evenly
from qarl.tasks.text import plain
from qarl.types import Prompt

SEEDS = 2**30
"""Training problems have seeds below this number, held-out problems above. Problem i of seed s is that of s + i."""
DRAWS = 4
"""Problems drawn for each that is requested: many repeat themselves, or are held out."""
MOST_NAMES = 12
"""Of generators or settings, in an error."""
REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What generators raise for settings that they do not take: each checks them in its own way."""
OWN_SETTINGS = {"seed", "size"}
"""Settings that are not the user's."""

Entry = dict[str, Any]
"""A problem as reasoning-gym has it: question, answer, metadata."""


class ReasoningGymTask(TemplateTask):
    """Raises ConfigError: no such generator, level or setting, a bad value, or a bad template."""

    def __init__(self, config: ReasoningGymTaskConfig, encode: Encode, special: re.Pattern[str] = NOTHING) -> None:
        super().__init__(config, encode, special)
        self._config = config
        self._datasets: list[GymDatasetConfig] = []
        for number, dataset in enumerate(config.datasets):
            where = f"task.datasets[{number}]"
            for one in _levels(dataset, where):
                _check(one, where)
                self._datasets.append(one)

    def load(self, seed: int, num_heldout: int, log: Log) -> tuple[list[Prompt], list[Prompt]]:
        seen: set[str] = set()
        draws = DRAWS * num_heldout
        levels = range(1, len(self._datasets) + 1)
        heldout = take_evenly([self._prompts(level, SEEDS, draws, seed, seen) for level in levels], num_heldout)
        log_shortage("held-out", len(heldout), num_heldout, log)
        train: list[Prompt] = []
        weights = [dataset.weight for dataset in self._datasets]
        for level, n in zip(levels, shares(self._config.num_prompts, weights), strict=True):
            found = list(islice(self._prompts(level, 0, DRAWS * n, seed, seen), n))
            log_shortage(f"level {level} training", len(found), n, log)
            train += found
        if not train:
            what = f"{len(heldout)} held-out problems leave none for training"
            raise ConfigError(what, "task.datasets", "widen their settings, or lower eval.final_num_prompts")
        return train, heldout

    def _prompts(self, level: int, first_seed: int, draws: int, seed: int, seen: set[str]) -> Iterator[Prompt]:
        """Those of `draws` problems of one generator whose questions are not in `seen`, which gets them."""
        dataset = self._datasets[level - 1]
        offset = random.Random(f"reasoning_gym/{seed}/{level}").randrange(SEEDS // 2)
        for entry in _entries(dataset, first_seed + offset, draws):
            key = plain(" ".join(entry["question"].split()))
            if key not in seen:
                seen.add(key)
                yield self._problem(entry, level, dataset)

    def _problem(self, entry: Entry, level: int, dataset: GymDatasetConfig) -> Prompt:
        scorer = {
            "dataset": dataset.name,
            "settings": dataset.settings,
            "entry": entry,
            "answer_pattern": self._config.answer_pattern,
        }
        question, answer = entry["question"], str(entry["answer"])
        return self._prompt(dataset.name, question, answer, level, source=dataset.name, verifier_kwargs=scorer)

    def is_well_formed(self, question: str) -> bool:
        """None of the policy's: the scorers know only problems that reasoning-gym made."""
        return False


def _entries(dataset: GymDatasetConfig, seed: int, n: int) -> Iterator[Entry]:
    """`n` problems, one after the other; problem i depends on `seed` + i."""
    from reasoning_gym import create_dataset  # late: it is slow to import

    yield from create_dataset(dataset.name, **dataset.settings, seed=seed, size=n)


def _levels(dataset: GymDatasetConfig, where: str) -> Iterator[GymDatasetConfig]:
    """The generator at each of its levels: with the settings that its curriculum has there, below the config's."""
    from reasoning_gym.coaching.base_curriculum import DefaultCurriculumContext, RangeAttributeMode
    from reasoning_gym.factory import CURRICULA, DATASETS, create_curriculum

    if not dataset.levels or dataset.name not in DATASETS:
        yield dataset
        return
    if dataset.name not in CURRICULA:
        raise ConfigError(f"{dataset.name} has no curriculum in reasoning-gym", f"{where}.levels", "set its settings")
    for level in dataset.levels:
        curriculum = create_curriculum(dataset.name)
        highest = max(len(attribute.levels) for attribute in curriculum.attributes.values()) - 1
        if level > highest:
            raise ConfigError(f"{dataset.name} has no level {level}", f"{where}.levels", f"the highest is {highest}")
        curriculum.set_global_level(level)
        # Of a range, what this level adds: a pool with all levels in it chooses among them.
        made = curriculum.generate_configuration(context=DefaultCurriculumContext(RangeAttributeMode.UPPER_BOUND))
        names = [name for attribute in curriculum.attributes.values() for name in _settings_of(attribute)]
        settings = {name: getattr(made, name) for name in names} | dataset.settings
        weight = dataset.weight / len(dataset.levels)
        yield dataset.model_copy(update={"settings": settings, "weight": weight, "levels": []})


def _settings_of(attribute: Any) -> list[str]:
    """The settings that an attribute of a curriculum sets: one, or two for a range."""
    known = ("field_name", "lower_field_name", "upper_field_name")
    return [getattr(attribute, name) for name in known if hasattr(attribute, name)]


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
    except REFUSALS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{dataset.name} refuses them: {reason}", f"{where}.settings", "change them") from error


def _nearest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    others = f" and {len(names) - MOST_NAMES} others" if len(names) > MOST_NAMES else ""
    return f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(names[:MOST_NAMES])}{others}"
