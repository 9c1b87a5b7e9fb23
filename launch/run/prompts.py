"""The prompts of a run, read before anything starts."""

from pathlib import Path

from transformers import AutoTokenizer

from launch.demo.tiny_model import make_tokenizer
from qarl.config.run import Config
from qarl.errors import DataError
from qarl.tasks import make_task
from qarl.tasks.task import Log, Task, encoder
from qarl.types import Prompt


def load_prompts(config: Config, log: Log) -> tuple[Task, list[Prompt], list[Prompt]]:
    """The task, its training prompts and its held-out prompts, without those that leave no room for a response.

    Raises:
        DataError: a data file or row is wrong, or no prompt of a split fits.
        ConfigError: the tokenizer has no chat template, or the task has no problem.
    """
    tokenizer = (
        make_tokenizer(config.model.build.vocab_size)
        if config.model.build and not Path(config.model.path).exists()
        else AutoTokenizer.from_pretrained(config.model.path, local_files_only=True)
    )
    task = make_task(config.task, encoder(tokenizer, config.task))
    loaded = task.load(config.seed, max(config.eval.num_prompts, config.eval.final_num_prompts), log)
    room = config.rollout.max_model_len - config.rollout.sampling.max_new_tokens
    train, heldout = ([p for p in prompts if len(p.token_ids) <= room] for prompts in loaded)
    if dropped := sum(map(len, loaded)) - len(train) - len(heldout):
        log(f"{dropped} prompts of over {room} tokens left out: rollout.max_model_len less max_new_tokens")
    if not train or not heldout:
        split = "training" if not train else "held-out"
        raise DataError(f"no {split} prompt fits in {room} tokens", "", "raise rollout.max_model_len")
    return task, train, heldout
