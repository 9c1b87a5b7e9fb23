"""The quickstart's model: a tiny Qwen3, made here and warm-started on demonstrations of a sloppy teacher."""

import errno
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from launch.early import read_model
from qarl.config.policy import ModelConfig, SFTConfig, TinyModelConfig
from qarl.config.task import TaskConfig
from qarl.errors import ConfigError, ModelError
from qarl.model_folder import config_json, read_json
from qarl.numerics.processor import threads
from qarl.quant.outliers import add_outliers
from qarl.tasks import make_task
from qarl.tasks.task import Log, PromptsTeacher, Teacher
from qarl.types import Prompt

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = {"digits": "0123456789=", "ascii": "".join(map(chr, range(32, 127))) + "\n"}
"""The tokens of a tokenizer, by `model.build.characters`."""
DECAY_SHARE = 0.3
"""The learning rate falls linearly over this last share of the warm start."""
RECIPE = "qarl_build.json"
"""In a built model's directory: what it was built from."""
LOG_EVERY = 50
"""SFT steps between progress lines."""
NOT_OF_THE_ARCHITECTURE = {"sft", "characters"}
_IGNORED = -100  # the label that cross_entropy skips


def ensure_model(config: ModelConfig, task: TaskConfig, seed: int, log: Log, prompts: Sequence[Prompt] = ()) -> None:
    """Make sure that `config.path` is a model directory, building it when nothing is there and `build` is set.

    Args:
        prompts: training prompts, which are demonstrated when the task has no teacher of its own.

    Raises ModelError: nothing is there and nothing can be built, or what is there is no model directory.
    """
    path = Path(config.path)
    check_model(config, task, prompts)
    if path.exists():
        if config.build is not None and not (path / RECIPE).is_file():
            _log_differences(path, config.build, log)
        return
    try:
        build(config, task, seed, log, prompts)
    except ModelError:
        if not (path / RECIPE).is_file():
            raise
        log(f"{path}: another run has made it meanwhile")
        _check_recipe(path, _recipe(config, _teacher(task, prompts)))


def check_model(config: ModelConfig, task: TaskConfig, prompts: Sequence[Prompt] = ()) -> None:
    """Raises ModelError as `ensure_model` does, and ConfigError for a bad task; builds nothing.

    Without `prompts` it does not tell which ones an existing model was shown.
    """
    path = Path(config.path)
    if path.exists() or config.build is None:
        read_model(config, task)
        if config.build is not None and (path / RECIPE).is_file():
            _check_recipe(path, _recipe(config, _teacher(task, prompts)))
    else:
        make_task(task)


def build(config: ModelConfig, task: TaskConfig, seed: int, log: Log, prompts: Sequence[Prompt] = ()) -> None:
    """Make the tiny model of `config.build`, warm-start it in float32, and save it at `config.path` in `config.dtype`.

    Equal seeds give equal weights on machines of one kind. The directory appears only when it is complete.

    Raises:
        ModelError: there is neither a teacher nor a prompt, something is at the path already, it cannot be written, or
            the vocabulary is too small.
        ConfigError: `model.build` is not set, or a bad task.
    """
    tiny, target, teacher = build_section(config), Path(config.path), _teacher(task, prompts)
    if teacher is None:
        what = f"nothing is there, and model.build needs training prompts, or a task with a teacher, not {task.kind}"
        raise ModelError(what, config.path, "`qarl train` builds it")
    if target.exists():
        raise ModelError("something is there already", config.path, "remove it or choose another model.path")
    make_parent(target)
    tokenizer = make_tokenizer(tiny.vocab_size, tiny.characters)
    with own_torch_state(seed):
        model = Qwen3ForCausalLM(architecture(tiny, tokenizer))
        log(f"{target}: making a Qwen3 of {model.num_parameters():,} parameters, {tiny.sft.steps} SFT steps")
        rng = random.Random(f"sft/{seed}")
        train(model, tokenizer, tiny.sft, teacher, rng, step_schedule(tiny.sft), f"/{tiny.sft.steps}", log)
    add_outliers(model, tiny.sft.outlier_bits)
    save(model, tokenizer, target, config.dtype, _recipe(config, teacher))


def make_tokenizer(vocab_size: int, characters: str = "digits") -> PreTrainedTokenizerFast:
    """Character tokenizer of some of `CHARACTERS`; `<bos>` is put in front, unused tokens fill up to `vocab_size`.

    Raises ModelError when `vocab_size` is too small.
    """
    used = [*SPECIAL, *CHARACTERS[characters]]
    if vocab_size < len(used):
        what = f"{vocab_size} is too small, {characters} are {len(used)} tokens"
        raise ModelError(what, "model.build.vocab_size", f"set it to {len(used)} or more")
    tokens = used + [f"<unused{i}>" for i in range(len(used), vocab_size)]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokens.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def step_schedule(sft: SFTConfig) -> list[float]:
    """Learning rate factor of each step: linear warm-up, flat, linear decay over the last 30%."""
    decay_steps = DECAY_SHARE * sft.steps
    return [warmup(sft, step) * min(1.0, (sft.steps - step) / decay_steps) for step in range(sft.steps)]


def warmup(sft: SFTConfig, step: int) -> float:
    return min(1.0, (step + 1) / max(1, sft.warmup_steps))


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sft: SFTConfig,
    teacher: Teacher,
    rng: random.Random,
    lr_factors: Iterable[float],
    total: str,
    log: Log,
) -> int:
    """One optimizer step per learning rate factor, each on fresh demonstrations; returns their number."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=sft.lr, betas=(sft.betas[0], sft.betas[1]), weight_decay=sft.weight_decay
    )
    model.train()
    steps = 0
    for factor in lr_factors:
        for group in optimizer.param_groups:
            group["lr"] = sft.lr * factor
        if sft.pack_tokens:
            loss = _packed_loss(model, _packs(tokenizer, sft, teacher, rng))
        else:
            loss = _loss(model, tokenizer, teacher.demonstrations(sft.batch_size, sft.swap_prob, rng))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), sft.max_grad_norm)
        optimizer.step()
        steps += 1
        if steps % LOG_EVERY == 0:
            log(f"SFT {steps}{total} loss {loss.item():.3f}")
    return steps


def _loss(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, demos: Sequence[tuple[str, str]]
) -> torch.Tensor:
    """Mean negative log-likelihood (nats) of the answer tokens and `<eos>`."""
    rows, labels = [], []
    for text, answer in demos:
        prompt = tokenizer.encode(text)
        response = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
        rows.append(torch.tensor(prompt + response))
        labels.append(torch.tensor([_IGNORED] * len(prompt) + response))
    # Padding is on the right, where causal attention never looks: no mask needed.
    ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    labels_BL = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=_IGNORED)
    logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits_BLV[:, :-1].flatten(0, 1), labels_BL[:, 1:].flatten(), ignore_index=_IGNORED
    )


def _packs(tokenizer: PreTrainedTokenizerFast, sft: SFTConfig, teacher: Teacher, rng: random.Random) -> torch.Tensor:
    """Rows of `pack_tokens` tokens cut from one stream of fresh demonstrations: [B, L]."""
    stream: list[int] = []
    while len(stream) < sft.batch_size * sft.pack_tokens:
        for text, answer in teacher.demonstrations(sft.batch_size, sft.swap_prob, rng):
            stream += [*tokenizer.encode(text + answer), tokenizer.eos_token_id]
    return torch.tensor(stream[: sft.batch_size * sft.pack_tokens]).view(sft.batch_size, -1)


def _packed_loss(model: Qwen3ForCausalLM, ids_BL: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood (nats) of all tokens but the first of each row."""
    logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), ids_BL[:, 1:].flatten())


def architecture(tiny: TinyModelConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    return Qwen3Config(
        **tiny.model_dump(exclude=NOT_OF_THE_ARCHITECTURE),
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _recipe(config: ModelConfig, teacher: Teacher | None) -> dict[str, Any]:
    """What a built model depends on, besides the seed: one warm start may serve runs of several seeds."""
    return {
        "dtype": config.dtype,
        **(teacher.settings if teacher else {}),
        **build_section(config).model_dump(mode="json"),
    }


def _check_recipe(path: Path, requested: dict[str, Any]) -> None:
    default = TinyModelConfig().model_dump(mode="json")
    found = default | read_json(path / RECIPE)  # a newer key had its default
    found["sft"] = default["sft"] | found["sft"] if isinstance(found["sft"], dict) else found["sft"]
    if differing := sorted(key for key in requested if requested[key] != found.get(key)):
        what = f"was built with other settings of {', '.join(differing)}"
        raise ModelError(what, str(path), "choose another model.path, or remove the directory to build it anew")


def save(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, target: Path, dtype: str, recipe: dict[str, Any]
) -> None:
    """Write a Hugging Face directory, complete or not at all; `recipe` is what it was built from.

    Raises ModelError when another process has put something there meanwhile.
    """
    model.to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        model.save_pretrained(f"{scratch}/model")
        tokenizer.save_pretrained(f"{scratch}/model")
        if recipe:
            Path(scratch, "model", RECIPE).write_text(json.dumps(recipe, indent=2))
        for file in Path(scratch, "model").iterdir():
            file.chmod(0o644)  # safetensors writes for its owner only
        try:
            Path(scratch, "model").rename(target)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
            raise ModelError("another run has made it meanwhile", str(target), "the same command takes it") from error


def _teacher(task: TaskConfig, prompts: Sequence[Prompt]) -> Teacher | None:
    """The task's own, or one that shows the answers of `prompts`. Raises ConfigError for a bad task."""
    return make_task(task).teacher or (PromptsTeacher(prompts) if prompts else None)


def build_section(config: ModelConfig) -> TinyModelConfig:
    if config.build is None:
        raise ConfigError("not set, but it says how the model is warm-started", "model.build", "set model.build={}")
    return config.build


def make_parent(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"cannot make its folder: {error.strerror}", str(target), "name another folder") from error
    if not os.access(target.parent, os.W_OK):
        raise ModelError("its folder is not writable", str(target), "name another folder")


def _log_differences(path: Path, tiny: TinyModelConfig, log: Log) -> None:
    """An existing model is used as it is: log where it differs from what `model.build` requests."""
    requested, found = tiny.model_dump(exclude=NOT_OF_THE_ARCHITECTURE), config_json(path)
    differing = [f"{key} {found.get(key)} (not {value})" for key, value in requested.items() if found.get(key) != value]
    if differing:
        log(f"{path}: exists and is used, although model.build differs: {', '.join(differing)}")


@contextmanager
def own_torch_state(seed: int) -> Iterator[None]:
    """Seeded torch on one thread, leaving the caller's random state and thread count as they were.

    One thread gives the same weights on any number of cores, and does not crawl when the other cores are busy.
    """
    with torch.random.fork_rng(devices=[]), threads(1):
        torch.manual_seed(seed)
        yield
