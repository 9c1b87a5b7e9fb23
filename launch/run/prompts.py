"""The prompts of a run, read before anything starts, and what makes new ones."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from launch.demo.tiny_model import make_tokenizer
from launch.preflight import model_config
from qarl.config.policy import TinyModelConfig
from qarl.config.pool import ProgramCheckConfig, VoteConfig
from qarl.config.run import Config
from qarl.errors import ConfigError, DataError, ModelError
from qarl.model_folder import read_tokenizer
from qarl.prompts.augment import Augmenter
from qarl.prompts.pool import Pool
from qarl.prompts.validate import ProgramCheck, SelfConsistency, Validator
from qarl.seeds import derive_seed
from qarl.tasks import make_task
from qarl.tasks.task import Log, Task, encoder, special_tokens
from qarl.types import Prompt
from rewards.teacher import Teacher


def load_prompts(config: Config, log: Log) -> tuple[Task, list[Prompt], list[Prompt]]:
    """The task, its training prompts and its held-out prompts, without those that leave no room for a response.

    Raises:
        DataError: a data file or row is wrong, a question holds a special token, or no prompt of a split fits.
        ConfigError: the tokenizer has no chat template, a prompt begins twice, or the task has no problem.
        ModelError: the tokenizer cannot be read, or makes ids for which the model has no embedding.
    """
    tokenizer = tokenizer_of(config)
    task = make_task(config.task, encoder(tokenizer, config.task), special_tokens(tokenizer))
    loaded = task.load(config.seed, max(config.eval.num_prompts, config.eval.final_num_prompts), log)
    _check_tokens(task, [*loaded[0], *loaded[1]], tokenizer, model_config(config).vocab_size, config.model.build)
    room = config.rollout.max_model_len - config.rollout.sampling.max_new_tokens
    train, heldout = ([p for p in prompts if len(p.token_ids) <= room] for prompts in loaded)
    if dropped := sum(map(len, loaded)) - len(train) - len(heldout):
        log(f"{dropped} prompts of over {room} tokens left out: rollout.max_model_len less max_new_tokens")
    if not train or not heldout:
        split = "training" if not train else "held-out"
        raise DataError(f"no {split} prompt fits in {room} tokens", "", "raise rollout.max_model_len")
    return task, train, heldout


def tokenizer_of(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer of the model, or of the one that `model.build` will make. Raises ModelError."""
    if config.model.build and not Path(config.model.path).exists():
        return make_tokenizer(config.model.build.vocab_size, config.model.build.characters)
    return read_tokenizer(Path(config.model.path))


def fill_pool(config: Config, prompts: Sequence[Prompt], log: Log) -> Pool:
    """The prompt pool of a run; `log` gets a line when not every step can have its prompts.

    Raises ConfigError: a step draws more prompts than there are, or the pool's capacity is too small.
    """
    requested, rest = config.train.prompts_per_step, config.pool.cooldown_steps
    if requested > len(prompts):
        what = f"{requested} prompts a step, but there are {len(prompts)}"
        raise ConfigError(what, "train.prompts_per_step", "lower it, or take more data")
    steps = min(config.train.steps, rest + 1)
    if requested * steps > len(prompts):
        log(
            f"{len(prompts)} prompts do not last for {steps} steps of train.prompts_per_step {requested}, and each "
            f"rests for pool.cooldown_steps {rest} then: some steps will have fewer, or none; lower one of the two"
        )
    return Pool(prompts, config.pool, derive_seed(config.seed, "pool"))


def _check_tokens(
    task: Task,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    build: TinyModelConfig | None,
) -> None:
    """Raises for prompts whose tokens are not what the data says."""
    first, unknown = tokenizer.bos_token_id, tokenizer.unk_token_id if build else None
    for prompt in prompts:
        question, ids = " ".join(task.question(prompt).split()), prompt.token_ids
        if not ids:
            raise DataError(f"the question '{question:.60}' has no tokens", hint="see the tokenizer's files")
        if build and unknown in ids:
            what = f"the question '{question:.60}' has characters that the tokenizer of model.build lacks"
            more = "" if build.characters == "ascii" else "set model.build.characters=ascii, or "
            raise DataError(what, hint=f"{more}leave such rows out")
        if max(ids) >= vocab_size:
            what = f"the tokenizer makes the id {max(ids)}, but the model's embedding ends at {vocab_size - 1}"
            raise ModelError(what, "model.path", "take the tokenizer that belongs to this model")
        if first is not None and ids[:2] == (first, first):
            what = f"prompts begin with '{tokenizer.bos_token}' twice: the tokenizer adds it to a text that has it"
            raise ConfigError(what, "task.prompt_template", "remove it there")


def make_augmenter(
    config: Config, task: Task, pool: Pool, prompts: Sequence[Prompt], heldout: Sequence[Prompt]
) -> Augmenter | None:
    """None when `pool.augment.per_step` is 0. Raises ConfigError when the teacher's key is not set."""
    if not config.pool.augment.per_step:
        return None
    sampling = config.rollout.sampling
    return Augmenter(
        config.pool.augment,
        pool,
        task,
        _validator(config, task),
        prompts,
        heldout,
        sampling,
        config.rollout.max_model_len - sampling.max_new_tokens,
        config.seed,
    )


def _validator(config: Config, task: Task) -> Validator:
    chosen = config.pool.augment.validator
    if isinstance(chosen, ProgramCheckConfig):
        assert task.solve is not None  # preflight has checked it
        return ProgramCheck(task.solve)
    return SelfConsistency(chosen) if isinstance(chosen, VoteConfig) else Teacher(chosen)
