"""The tensors of the learner's GEMM, named and laid out as compressed-tensors does: to publish, and as a folder."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from qarl.model_folder import config_json
from qarl.quant.experts import QuantizedExperts, expert_weights, is_stack
from qarl.quant.formats import quantization_config
from qarl.quant.linear import Gather, QuantizedLinear, gather_nothing
from qarl.quant.scheme import QuantScheme
from qarl.weights.source import PublishedWeights
from qarl.weights.wire import pack, seal

COPIED = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tekken.json"),
    *("chat_template.*", "*.tiktoken", "LICENSE*", "NOTICE*"),
)
"""Files of a model folder, besides weights and config, that its copies have."""


def checkpoint_tensors(
    model: nn.Module, gather: Gather = gather_nothing, quantized: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Yield (checkpoint name, tensor) of every parameter; only one module at a time is gathered.

    A quantized linear gives the tensors of its format (W8A8: int8 `X.weight` and `X.weight_scale`). Tied embeddings
    give `lm_head.weight` as well: vLLM's reload keeps the old head when it is left out.

    Args:
        gather: makes sharded parameters whole within its context (ZeRO-3).
        quantized: False gives the plain parameters.
    """
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        parameters = dict(module.named_parameters(recurse=False))
        if not parameters:
            continue
        with gather(list(parameters.values())):
            if quantized and isinstance(module, QuantizedLinear | QuantizedExperts):
                parameters = {key: p for key, p in parameters.items() if key == "bias"}
                for key, tensor in module.quantized().items():
                    yield prefix + key, tensor
            elif is_stack(module):
                parameters = {f"{part}.weight": weight for part, weight in expert_weights(module)}
            for key, parameter in parameters.items():
                yield prefix + key, parameter.detach()


def publish(model: nn.Module, scheme: QuantScheme, version: int, gather: Gather = gather_nothing) -> PublishedWeights:
    """All tensors of the model as version `version`, in memory."""
    return seal(version, scheme.label, [pack(name, tensor) for name, tensor in checkpoint_tensors(model, gather)])


def write_checkpoint(tensors: Iterator[tuple[str, Tensor]], directory: Path, source: Path, scheme: QuantScheme) -> None:
    """Write a Hugging Face checkpoint folder: `tensors`, and config and tokenizer files of `source`.

    With a quantizing `scheme` the config carries the compressed-tensors `quantization_config`. The folder appears
    whole or not at all.
    """
    part = directory.with_name(directory.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        write_engine_config(part, source, scheme)
        save_file({n: t.contiguous().cpu().clone() for n, t in tensors}, part / "model.safetensors", {"format": "pt"})
        (part / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner only
        shutil.rmtree(directory, ignore_errors=True)
        part.rename(directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_engine_config(directory: Path, source: Path, scheme: QuantScheme) -> None:
    """Config and tokenizer of `source`, with the scheme's `quantization_config`: a model folder without weights."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and any(file.match(pattern) for pattern in COPIED):
            shutil.copy(file, directory / file.name)
    config = config_json(source)
    if (quantization := quantization_config(scheme)) is not None:
        config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config, indent=2))
