"""Weights on the wire and on disk: the bytes of the learner's GEMM, named and laid out as compressed-tensors does."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qarl.errors import ModelError, PublicationError
from qarl.protocols import WeightSource
from qarl.quant.experts import QuantizedExperts, expert_weights, is_stack
from qarl.quant.formats import quantization_config
from qarl.quant.linear import Gather, QuantizedLinear, whole
from qarl.quant.scheme import QuantScheme
from qarl.types import Bucket, Manifest, PublishedTensor, PublishedWeights

BUCKET_BYTES = 64 * 2**20
_WITHOUT_NUMPY = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}
"""dtypes that numpy lacks, and those that carry their bits."""


def checkpoint_tensors(
    model: nn.Module, gather: Gather = whole, quantized: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, tensor) of every parameter, one module at a time.

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


def packed(model: nn.Module, gather: Gather = whole, limit: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """The model's tensors in host memory, with digests; a bucket ends with the tensor that fills `limit` bytes.

    No more than one bucket, and one module made whole, is in memory here at a time.
    """
    bucket: list[PublishedTensor] = []
    for name, tensor in checkpoint_tensors(model, gather):
        bucket.append(pack(name, tensor))
        if sum(packed.data.nbytes for packed in bucket) >= limit:
            yield tuple(bucket)
            bucket = []
    if bucket:
        yield tuple(bucket)


def publish(model: nn.Module, scheme: QuantScheme, version: int, gather: Gather = whole) -> PublishedWeights:
    """All tensors of the model as version `version`, in memory."""
    return seal(version, scheme.label, [tensor for bucket in packed(model, gather) for tensor in bucket])


def seal(version: int, scheme: str, tensors: Sequence[PublishedTensor]) -> PublishedWeights:
    """`tensors` with their manifest."""
    return PublishedWeights(make_manifest(version, scheme, [(t.name, t.digest) for t in tensors]), tuple(tensors))


def make_manifest(version: int, scheme: str, tensors: Sequence[tuple[str, str]]) -> Manifest:
    """The manifest of (name, digest) pairs; its own digest covers version, scheme, names and digests."""
    lines = "\n".join(" ".join(pair) for pair in tensors)
    digest = hashlib.blake2b(f"{version} {scheme}\n{lines}".encode(), digest_size=16).hexdigest()
    return Manifest(version, scheme, tuple(tensors), digest)


def unpack(weights: WeightSource) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, tensor) in order, each checked against the manifest before it is given out.

    Raises:
        PublicationError: a manifest, a tensor or a set of tensors that is not what was published.
    """
    manifest = weights.manifest
    where = f"weights version {manifest.version}"
    if make_manifest(manifest.version, manifest.scheme, manifest.tensors) != manifest:
        raise PublicationError("the manifest differs from its digest", where)
    expected = iter(manifest.tensors)
    for tensor in (tensor for bucket in weights.buckets() for tensor in bucket):
        name, digest = next(expected, ("nothing", ""))
        if tensor.name != name:
            raise PublicationError(f"{tensor.name} came where {name} was expected", where)
        if _digest(name, tensor.dtype, tensor.data) != digest:
            raise PublicationError(f"{name} differs from its digest", where)
        yield name, to_torch(tensor)
    if missing := next(expected, None):
        raise PublicationError(f"{missing[0]} is missing", where)


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
        if file.is_file() and file.suffix not in {".safetensors", ".bin"} and not file.name.endswith(".index.json"):
            shutil.copy(file, directory / file.name)
    config = unquantized_config(source)
    if (quantization := quantization_config(scheme)) is not None:
        config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def unquantized_config(model: Path) -> dict[str, Any]:
    """The `config.json` of a model folder. Raises ModelError when there is none, or the model is quantized already."""
    if not (model / "config.json").is_file():
        raise ModelError("holds no config.json", where=str(model), mend="give a Hugging Face model folder")
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    if quantization := config.get("quantization_config"):
        raise ModelError(
            f"is quantized already ({quantization.get('quant_method', 'unknown method')})",
            where=str(model),
            mend="give the full-precision model; qarl quantizes it as rollout.scheme says",
        )
    return config


def pack(name: str, tensor: Tensor) -> PublishedTensor:
    """One tensor with its digest, copied to host memory."""
    copied = to_host(name, tensor)
    return replace(copied, digest=_digest(name, copied.dtype, copied.data))


def to_host(name: str, tensor: Tensor) -> PublishedTensor:
    """One tensor without a digest, copied to host memory: whoever gave `tensor` goes on changing its own."""
    return PublishedTensor(name, _name(tensor.dtype), _bits(tensor).copy())


def digest_of(name: str, tensor: Tensor) -> str:
    """The digest of a tensor as `pack` would give it."""
    return _digest(name, _name(tensor.dtype), _bits(tensor))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bits(tensor: Tensor) -> np.ndarray:
    host = tensor.detach().contiguous().cpu()
    return host.view(_WITHOUT_NUMPY.get(host.dtype, host.dtype)).numpy()


def arrived(weights: WeightSource) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, tensor) in order, unchecked: of weights that `unpack` has gone through."""
    return ((tensor.name, to_torch(tensor)) for bucket in weights.buckets() for tensor in bucket)


def to_torch(tensor: PublishedTensor) -> Tensor:
    """The tensor, in memory of its own."""
    # Arrays from the object store are read-only and shared; torch wants its own.
    return torch.from_numpy(tensor.data.copy()).view(getattr(torch, tensor.dtype))


def _digest(name: str, dtype: str, data: np.ndarray) -> str:
    digest = hashlib.blake2b(f"{name}|{dtype}|{data.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(data).view(np.uint8).data)
    return digest.hexdigest()
