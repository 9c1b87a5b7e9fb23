"""Keys of the tasks."""

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from qarl.config.base import Node, PathText, PositiveFloat

MOST_PROMPTS = 10_000_000
"""Generated prompts, which are all held in memory."""


class SortingTaskConfig(Node):
    """Generated task: sort the digits of `529172=` into `122579`. Held out when crc32(answer) is 0 mod 10."""

    has_program: ClassVar[bool] = True  # a program answers every question
    chat: ClassVar[bool] = False
    system_prompt: ClassVar[None] = None
    chat_template_kwargs: ClassVar[dict[str, Any]] = {}
    kind: Literal["sorting"] = "sorting"
    num_prompts: Annotated[int, Field(ge=1, le=MOST_PROMPTS)] = 2048
    """Training prompts generated for the pool."""
    levels: list[int] = [2, 3, 4, 5, 6, 8, 10, 12]
    """Digits per problem; each level is a difficulty."""


class _PromptConfig(Node):
    """How a question becomes a prompt."""

    prompt_template: str = "{question}"
    """Text of the prompt; `{question}` is replaced."""
    chat: bool = True
    """Wrap the prompt as a user turn of the tokenizer's chat template."""
    system_prompt: str | None = None
    """System turn of the chat; null leaves it to the chat template, which may have one of its own."""
    chat_template_kwargs: dict[str, Any] = {}
    """Further arguments of the chat template, for example `enable_thinking`."""


class DatasetTaskConfig(_PromptConfig):
    """Problems from rows of at least a question and an answer.

    A path is a JSONL file, a Parquet file (`.parquet`), or a folder that Hugging Face `datasets` saved."""

    has_program: ClassVar[bool] = False
    kind: Literal["dataset"] = "dataset"
    train_path: PathText = Field(default=...)
    """Training rows: JSONL, Parquet (`.parquet`), or a folder of Hugging Face `datasets`. Required."""
    heldout_path: PathText = Field(default=...)
    """Held-out rows, never in the pool. Required."""
    question_key: str = "question"
    """Field that holds the problem."""
    answer_key: str = "answer"
    """Field that holds the reference answer."""
    answer_delimiter: str = ""
    """The answer is what follows the last occurrence of this text (GSM8K: `####`); empty takes the whole field."""
    level_key: str = ""
    """Field with an integer difficulty, for reports; empty for none."""


class GymDatasetConfig(Node):
    """One of reasoning-gym's generators. A generator may be listed several times, with other settings."""

    name: str = Field(default=...)
    """Its name, for example `chain_sum`. Required."""
    weight: PositiveFloat = 1.0
    """Its share of the training prompts, relative to the other weights."""
    settings: dict[str, Any] = {}
    """Fields of its config class, for example `{min_terms: 2, max_terms: 3}`; the others keep its defaults."""


class ReasoningGymTaskConfig(_PromptConfig):
    """Generated problems of reasoning-gym, judged by its scorers (`reward.kind: reasoning_gym`)."""

    has_program: ClassVar[bool] = False
    kind: Literal["reasoning_gym"] = "reasoning_gym"
    datasets: Annotated[list[GymDatasetConfig], Field(min_length=1)] = Field(default=...)
    """The generators. In reports, level 1 is the first of them, level 2 the second, and so on. Required."""
    num_prompts: Annotated[int, Field(ge=1, le=MOST_PROMPTS)] = 2048
    """Training prompts generated for the pool. Held-out prompts come from other seeds and are no training prompts."""
    answer_pattern: str = ""
    """Regular expression; the answer is its last match in the response, or that match's first group. Empty takes the
    whole response without white space around it."""

    @field_validator("answer_pattern")
    @classmethod
    def _pattern_compiles(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"task.answer_pattern: not a regular expression: {error}") from None
        if groups > 1:
            raise ValueError(f"task.answer_pattern: has {groups} groups, but the answer is one; write (?:...)")
        return pattern


TaskConfig = Annotated[SortingTaskConfig | DatasetTaskConfig | ReasoningGymTaskConfig, Field(discriminator="kind")]
"""Every kind of task; `qarl/tasks` has the class of each."""
