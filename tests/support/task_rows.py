"""Rows of questions and answers, and configs of tasks that read them from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qarl.config.task import DatasetTaskConfig


def quiet(line: str) -> None:
    """Takes notes and forgets them."""


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def qa(*questions: str, **extra: Any) -> list[dict[str, Any]]:
    return [{"question": question, "answer": f"answer to {question}", **extra} for question in questions]


def config_of(tmp_path: Path, train: list[Any], heldout: list[Any], **keys: Any) -> DatasetTaskConfig:
    return DatasetTaskConfig(
        train_path=write(tmp_path / "train.jsonl", train),
        heldout_path=write(tmp_path / "heldout.jsonl", heldout),
        **keys,
    )
