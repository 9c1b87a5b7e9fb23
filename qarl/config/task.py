"""Keys of the tasks."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from qarl.config.base import (
    Node,
    PositiveInt,
)


class SortingTaskConfig(Node):
    """Generated task: sort the digits of `529172=` into `122579`. Held out when crc32(answer) is 0 mod 10."""

    has_program: ClassVar[bool] = True  # a program answers every question
    chat: ClassVar[bool] = False
    kind: Literal["sorting"] = "sorting"
    """Which task."""
    num_prompts: PositiveInt = 2048
    """Training prompts generated for the pool."""
    levels: list[int] = [2, 3, 4, 5, 6, 8, 10, 12]
    """Digits per problem; each level is a difficulty."""


class DatasetTaskConfig(Node):
    """Problems from rows of at least a question and an answer.

    A path is a JSONL file, a Parquet file (`.parquet`), or a folder that Hugging Face `datasets` saved."""

    has_program: ClassVar[bool] = False
    kind: Literal["dataset"] = "dataset"
    """Which task."""
    train_path: str = Field(default=...)
    """Training rows: JSONL, Parquet (`.parquet`), or a folder of Hugging Face `datasets`. Required."""
    heldout_path: str = Field(default=...)
    """Held-out rows, never in the pool. Required."""
    question_key: str = "question"
    """Field that holds the problem."""
    answer_key: str = "answer"
    """Field that holds the reference answer."""
    answer_delimiter: str = ""
    """The answer is what follows the last occurrence of this text (GSM8K: `####`); empty takes the whole field."""
    level_key: str = ""
    """Field with an integer difficulty, for reports; empty for none."""
    prompt_template: str = "{question}"
    """Text of the prompt; `{question}` is replaced."""
    chat: bool = True
    """Wrap the prompt as a user turn of the tokenizer's chat template."""


TaskConfig = Annotated[SortingTaskConfig | DatasetTaskConfig, Field(discriminator="kind")]
"""Every kind of task; `qarl/tasks` has the class of each."""
