"""A Hugging Face model folder. What is wrong with one is a `ModelError` that names it, found without its weights.

torch and transformers take long to import, and functions that need them do so; `config_json` needs neither.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qarl.errors import ModelError, QarlError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DOWNLOAD = "download the model again"
ANY_FOLDER = "give a Hugging Face model folder"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""In the order in which transformers looks for them; each may be in shards that an index lists."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""One of them at least: without any, transformers invents a tokenizer."""
LFS = b"version https://git-lfs"
"""How a file begins that Git LFS has not replaced by its content."""
FULL_PRECISION = ("F64", "F32", "F16", "BF16")


@contextmanager
def reading(folder: Path, part: str) -> Iterator[None]:
    """Turns what libraries raise while they read `part` of `folder` into one ModelError, and silences them."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except QarlError:
        raise
    except Exception as error:  # tokenizers raises plain Exception, transformers whatever a damaged file leads to
        raise _damaged(folder, part, error) from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _damaged(folder: Path, part: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split()) or "no reason given"
    return ModelError(f"{part}: {type(error).__name__}: {reason:.240}", str(folder), DOWNLOAD)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a model folder. Raises ModelError."""
    try:
        content = file.read_bytes()
        if content.startswith(LFS):
            raise ModelError(f"{file.name} is a Git LFS pointer", str(file.parent), "`git lfs pull` fetches the file")
        found = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file.parent, file.name, error) from error
    if not isinstance(found, dict):
        raise ModelError(f"{file.name} is not a JSON object", str(file.parent), DOWNLOAD)
    return found


def config_json(folder: Path, hint: str = ANY_FOLDER) -> dict[str, Any]:
    """The content of config.json. Raises ModelError: there is none, or the model is quantized already.

    `hint`: what to do when there is no such folder.
    """
    if not folder.is_dir():
        raise ModelError("not a directory" if folder.exists() else "no such model directory", str(folder), hint)
    if not (folder / "config.json").is_file():
        raise ModelError("holds no config.json", str(folder), ANY_FOLDER)
    config = read_json(folder / "config.json")
    found = config.get("quantization_config") or config.get("compression_config")
    if found or (folder / "hf_quant_config.json").exists():
        method = found.get("quant_method", "unknown method") if isinstance(found, dict) else found or "unknown method"
        what = f"is quantized already ({method})"
        raise ModelError(what, str(folder), "give the full-precision model; qarl quantizes it as rollout.scheme says")
    if not isinstance(config.get("model_type"), str):
        raise ModelError("config.json names no model_type", str(folder), DOWNLOAD)
    return config


def read_config(folder: Path) -> Any:
    """The transformers config. Raises ModelError, as `config_json` and for what transformers does not understand."""
    config_json(folder)
    from transformers import AutoConfig

    with reading(folder, "config.json"):
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer. Raises ModelError: there is none, it cannot be read, or knows no token."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"holds no tokenizer ({', '.join(TOKENIZER_FILES)})", str(folder), DOWNLOAD)
    from transformers import AutoTokenizer

    with reading(folder, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        if not tokenizer.encode("1", add_special_tokens=False):
            raise ModelError("the tokenizer has no token for '1'", str(folder), DOWNLOAD)
    return tokenizer


def meta_model(config: Any, dtype: torch.dtype | None = None, where: str = "") -> Any:
    """The model of a transformers config, without memory, in bfloat16 unless `dtype` says otherwise.

    Raises ModelError for what is no causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    where = where or config.model_type
    if config.is_encoder_decoder or config.get_text_config() is not config:
        what = f"{config.model_type} is not a model of text alone that continues a prompt"
        raise ModelError(what, where, "see docs/models.md")
    with reading(Path(where), "config.json"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype or torch.bfloat16, trust_remote_code=False)


def check_folder(folder: Path) -> Any:
    """The folder's model on the meta device, after its config, tokenizer and the headers of its weights were read.

    Raises ModelError: a part is missing, cannot be read, or does not belong to the others.
    """
    model = meta_model(read_config(folder), where=str(folder))
    from transformers import GenerationConfig

    for file in folder.glob("*.json"):
        if not file.is_file():  # a folder, or a link to nothing
            raise ModelError("is no file that can be read", str(file), "download the model again")
    named, kind = config_json(folder).get("architectures"), type(model).__name__
    if named != [kind]:
        what = f"config.json names the architectures {named}, which the engine takes; its model_type is {kind}"
        raise ModelError(what, str(folder), f'set "architectures" to ["{kind}"] if that is what it is')
    read_tokenizer(folder)
    if (folder / "generation_config.json").exists():
        with reading(folder, "generation_config.json"):
            GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    stored = stored_tensors(folder)
    with reading(folder, "weights"):
        _, info = type(model).from_pretrained(
            None, config=model.config, state_dict=stored, dtype=model.dtype, device_map={"": "meta"}, **LOADING
        )
    _check_loaded(info, folder)
    return model


def load_model(folder: Path, dtype: torch.dtype | str) -> Any:
    """The model with its weights, in evaluation mode. Raises ModelError as `check_folder`, but reads no tokenizer."""
    model = meta_model(read_config(folder), where=str(folder))
    stored_tensors(folder)
    with reading(folder, "weights"):
        loaded, info = type(model).from_pretrained(str(folder), dtype=dtype, local_files_only=True, **LOADING)
    _check_loaded(info, folder)
    return loaded


LOADING = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Transformers returns what it would fill with random values, and `_check_loaded` refuses it."""


def _check_loaded(info: Mapping[str, Any], folder: Path) -> None:
    """Raises ModelError unless every stored tensor is used and every parameter has one."""
    mismatched = [f"{name}, {_shape(stored)} and not {_shape(own)}" for name, stored, own in info["mismatched_keys"]]
    for names, what in (
        (info["missing_keys"], "missing"),
        (info["unexpected_keys"], "stored but no part of this model"),
        (mismatched, "of other shapes than config.json says"),
        (info["error_msgs"], "unreadable"),
    ):
        if names:
            what = f"{len(names)} weights are {what}, {min(names)} first"
            raise ModelError(what, str(folder), "take the config.json and the weights of one model in full precision")


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """What the headers of the weight files list, as tensors without memory.

    Raises ModelError: a file is missing, cut short, or holds low-bit weights.
    """
    found: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        if not file.is_file():
            raise ModelError(f"{file.name} is missing", str(folder), DOWNLOAD)
        with reading(folder, file.name):
            with file.open("rb") as content:
                if content.read(len(LFS)) == LFS:
                    hint = "`git lfs pull` fetches the file"
                    raise ModelError(f"{file.name} is a Git LFS pointer", str(folder), hint)
            found |= _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
    if not found:
        raise ModelError("its weight files hold no tensor", str(folder), DOWNLOAD)
    return found


def _weight_files(folder: Path) -> list[Path]:
    """Those that transformers would read."""
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return [folder / name]
        if index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise ModelError(f"{index.name} has no weight_map of file names", str(folder), DOWNLOAD)
            return [folder / shard for shard in sorted(set(shards.values()))]
    raise ModelError(f"holds no weights ({' or '.join(WEIGHT_FILES)}, or shards)", str(folder), DOWNLOAD)


def _safetensors(file: Path) -> dict[str, Tensor]:
    import torch
    from safetensors import safe_open

    found = {}
    with safe_open(file, "pt") as content:
        for name in content.keys():  # noqa: SIM118  it is no dict
            part = content.get_slice(name)
            if name.endswith(".weight") and part.get_dtype() not in FULL_PRECISION:
                what = f"{name} is stored as {part.get_dtype()}: the model is quantized already"
                raise ModelError(what, str(file.parent), "give the full-precision model")
            found[name] = torch.empty(part.get_shape(), device="meta")
    return found


def _pickled(file: Path) -> dict[str, Tensor]:
    import torch

    content = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    return {name: torch.empty(tensor.shape, device="meta") for name, tensor in content.items()}
