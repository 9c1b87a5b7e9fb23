"""Keys of the tasks."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from qarl.config.base import AtMostOneGroup, Count, Node, PathText

Weight = Annotated[float, Field(gt=0.0, le=1e9)]
SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=100)]
Level = Annotated[int, Field(ge=1, le=4000)]
"""Digits of a sorting problem; Python converts no longer numbers."""
MOST_PROMPTS = 10_000_000
"""Generated prompts, which are all held in memory."""


class SortingTaskConfig(Node):
    """Generated task: sort the digits of `529172=` into `122579`. Held out when crc32(answer) is 0 mod 10."""

    chat: ClassVar[bool] = False
    system_prompt: ClassVar[None] = None
    chat_template_kwargs: ClassVar[dict[str, Any]] = {}
    kind: Literal["sorting"] = "sorting"
    num_prompts: Annotated[int, Field(ge=1, le=MOST_PROMPTS)] = 2048
    """Training prompts generated for the pool."""
    levels: Annotated[list[Level], Field(min_length=1)] = [2, 3, 4, 5, 6, 8, 10, 12]
    """Digits per problem; each level is a difficulty."""

    def contradictions(self) -> Iterator[str]:
        if len(set(self.levels)) < len(self.levels):
            yield f"task.levels: {self.levels} names a level twice"


class TemplateConfig(Node):
    """How a question becomes a prompt."""

    prompt_template: str = "{question}"
    """Text of the prompt; `{question}` is replaced."""
    chat: bool = True
    """Wrap the prompt as a user turn of the tokenizer's chat template."""
    system_prompt: str | None = None
    """System turn of the chat, for rows without one of their own; null leaves it to the chat template, which may have
    one."""
    chat_template_kwargs: dict[str, Any] = {}
    """Further arguments of the chat template, for example `enable_thinking`."""

    def contradictions(self) -> Iterator[str]:
        if not self.chat and (self.system_prompt is not None or self.chat_template_kwargs):
            yield "task.chat: false has no use for system_prompt and chat_template_kwargs; leave them out"


PRESETS: dict[str, dict[str, str]] = {
    "gsm8k": {"answer_delimiter": "####"},
    "math": {"question_key": "problem", "level_key": "level"},
    "verl": {"question_key": "prompt", "answer_key": "reward_model.ground_truth", "source_key": "data_source"},
    "openai_chat": {"question_key": "messages", "answer_key": "messages.-1.content"},
}
"""Keys of `RowConfig` that fit files as others write them."""


class RowConfig(Node):
    """How a row becomes a problem. A key names a field; `a.b` is field b of field a, and `a.-1` the last of list a."""

    preset: Literal["gsm8k", "math", "verl", "openai_chat"] | None = None
    """Sets the keys below that are not given. `gsm8k`: the answer follows `####`. `math`: problem, answer, level.
    `verl`: prompt, reward_model.ground_truth, data_source. `openai_chat`: messages, of which the last is the answer."""
    question_key: str = "question"
    """Field that holds the problem: a text, or chat messages (`role` and `content`) that end with the user's."""
    answer_key: str = "answer"
    """Field that holds the reference answer: a text, a number, or a list of accepted ones, the first of which is the
    reference."""
    answer_delimiter: str = ""
    """The answer is what follows the last occurrence of this text (GSM8K: `####`); empty takes the whole field."""
    level_key: str = ""
    """Field with a difficulty, for reports: an integer, or a text such as `Level 3`; empty for none."""
    source_key: str = ""
    """Field that says which data a row is of, by which rewards may be chosen; empty for none."""
    source: str = ""
    """What it says where there is no `source_key`."""
    max_wrong_rows: Count = 0
    """Rows of a file that may be left out because they are wrong, such as those without an answer; a line tells of
    them. More are an error."""

    @model_validator(mode="before")
    @classmethod
    def _preset_sets_keys(cls, given: Any) -> Any:
        preset = given.get("preset") if isinstance(given, dict) else None
        return {**PRESETS[preset], **given} if isinstance(preset, str) and preset in PRESETS else given


class DataFileConfig(RowConfig):
    """A file of rows. Keys that it does not set are those of the task, unless it has a preset of its own."""

    path: PathText = Field(default=...)
    """JSONL, a JSON array, CSV (`.csv`), Parquet (`.parquet`), or a folder that Hugging Face `datasets` saved.
    Required."""


class TrainFileConfig(DataFileConfig):
    """A file of training rows, perhaps one of several."""

    weight: Weight | None = None
    """Its share of the training prompts, relative to the weights of the other files: as many rows are taken as all the
    shares allow. null, for all files, takes every row."""


class DatasetTaskConfig(TemplateConfig, RowConfig):
    """Problems from rows of at least a question and an answer."""

    kind: Literal["dataset"] = "dataset"
    train_path: Annotated[list[TrainFileConfig], Field(min_length=1)] = Field(default=...)
    """Training rows: a path, or a list of paths and files, whose keys follow. Required."""
    heldout_path: Annotated[dict[SetName, DataFileConfig], Field(min_length=1)] = Field(default=...)
    """Held-out rows, never in the pool: a path, a file, or several held-out sets by name. Required."""

    @model_validator(mode="before")
    @classmethod
    def _files_take_the_tasks_keys(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        keys = {key: given[key] for key in RowConfig.model_fields if key in given}

        def file(entry: Any) -> Any:
            entry = {"path": entry} if isinstance(entry, str) else entry
            return {**keys, **entry} if isinstance(entry, dict) and entry.get("preset") is None else entry

        train, heldout = given.get("train_path"), given.get("heldout_path")
        if isinstance(train, str | dict):
            train = [train]
        if isinstance(heldout, str) or (isinstance(heldout, dict) and isinstance(heldout.get("path"), str)):
            heldout = {"heldout": heldout}
        if isinstance(train, list):
            given = {**given, "train_path": [file(entry) for entry in train]}
        if isinstance(heldout, dict):
            given = {**given, "heldout_path": {name: file(entry) for name, entry in heldout.items()}}
        return given

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if len({file.weight is None for file in self.train_path}) > 1:
            yield "task.train_path: give a weight to every file, or to none"


class CustomTaskConfig(TemplateConfig, RowConfig):
    """Problems from a function or class of your own (docs/tasks.md)."""

    kind: Literal["custom"] = "custom"
    function: str = Field(default=...)
    """`(seed, **kwargs) -> (training rows, held-out rows)`, or a class that is made with `kwargs` and called with the
    seed: `module:function` or `path/to/file.py:function`. Required."""
    kwargs: dict[str, Any] = {}
    """Keyword arguments of `task.function`."""


class GymDatasetConfig(Node):
    """One of reasoning-gym's generators. A generator may be listed several times, with other settings."""

    name: str = Field(default=...)
    """Its name, for example `chain_sum`. Required."""
    weight: Weight = 1.0
    """Its share of the training prompts, relative to the other weights."""
    settings: dict[str, Any] = {}
    """Fields of its config class, for example `{min_terms: 2, max_terms: 3}`; the others keep its defaults."""
    levels: list[Count] = []
    """Levels of its curriculum in reasoning-gym, from 0, with equal shares of `weight`; `settings` come before theirs.
    Empty for no curriculum."""


class ReasoningGymTaskConfig(TemplateConfig):
    """Generated problems of reasoning-gym, judged by its scorers (`reward.kind: reasoning_gym`)."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    datasets: Annotated[list[GymDatasetConfig], Field(min_length=1)] = Field(default=...)
    """The generators. In reports, level 1 is the first of them, level 2 the second, and so on; a generator with several
    `levels` counts as several. Required."""
    num_prompts: Annotated[int, Field(ge=1, le=MOST_PROMPTS)] = 2048
    """Training prompts generated for the pool. Held-out prompts come from other seeds and are no training prompts."""
    answer_pattern: AtMostOneGroup = ""
    """Regular expression; the answer is its last match in the response, or that match's first group. Empty takes the
    whole response without white space around it."""


TaskConfig = Annotated[
    SortingTaskConfig | DatasetTaskConfig | ReasoningGymTaskConfig | CustomTaskConfig, Field(discriminator="kind")
]
"""Every kind of task; `qarl/tasks` has the class of each."""
