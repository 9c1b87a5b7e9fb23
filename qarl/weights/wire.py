"""Tensors as bytes with digests, and back."""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from qarl.errors import PublicationError
from qarl.weights.source import Bucket, Manifest, PublishedTensor, PublishedWeights, WeightSource

BUCKET_BYTES = 64 * 2**20
_WITHOUT_NUMPY = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}
"""dtypes that numpy lacks, and the integers that carry their bits."""


def seal(version: int, scheme: str, tensors: Sequence[PublishedTensor]) -> PublishedWeights:
    """`tensors` with their manifest."""
    return PublishedWeights(make_manifest(version, scheme, [(t.name, t.digest) for t in tensors]), tuple(tensors))


def make_manifest(version: int, scheme: str, tensors: Sequence[tuple[str, str]]) -> Manifest:
    """The manifest of (name, digest) pairs; its own digest covers version, scheme, names and digests."""
    lines = "\n".join(" ".join(pair) for pair in tensors)
    digest = hashlib.blake2b(f"{version} {scheme}\n{lines}".encode(), digest_size=16).hexdigest()
    return Manifest(version, scheme, tuple(tensors), digest)


def unpack(weights: WeightSource) -> Iterator[tuple[str, Tensor]]:
    """Yield (checkpoint name, tensor) in order, each after its check against the manifest.

    Raises PublicationError: the manifest, a tensor or the set of tensors is not what was published.
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


def in_buckets(tensors: Iterable[tuple[str, Tensor]], limit: int = BUCKET_BYTES, copy: bool = True) -> Iterator[Bucket]:
    """Pack (name, tensor) pairs into buckets; a bucket ends with the tensor that fills `limit` bytes.

    Only one bucket at a time is in memory here. Without `copy` it shows the memory of tensors that lie in host memory,
    which must not change before the next bucket is taken.
    """
    bucket: list[PublishedTensor] = []
    for name, tensor in tensors:
        bucket.append(pack(name, tensor, copy))
        if sum(packed.data.nbytes for packed in bucket) >= limit:
            yield tuple(bucket)
            bucket = []
    if bucket:
        yield tuple(bucket)


def pack(name: str, tensor: Tensor, copy: bool = True) -> PublishedTensor:
    """One tensor with its digest, in host memory; `copy` as in `in_buckets`."""
    packed = to_host(name, tensor, copy)
    return replace(packed, digest=_digest(name, packed.dtype, packed.data))


def to_host(name: str, tensor: Tensor, copy: bool = True) -> PublishedTensor:
    """One tensor without a digest, in host memory; `copy` as in `in_buckets`."""
    data = _bits(tensor)
    return PublishedTensor(name, _name(tensor.dtype), data.copy() if copy else data)


def digest_of(name: str, tensor: Tensor) -> str:
    """The digest that `pack` gives this tensor."""
    return _digest(name, _name(tensor.dtype), _bits(tensor))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bits(tensor: Tensor) -> np.ndarray:
    host = tensor.detach().contiguous().cpu()
    return host.view(_WITHOUT_NUMPY.get(host.dtype, host.dtype)).numpy()


def to_torch(tensor: PublishedTensor, copy: bool = True) -> Tensor:
    """The tensor. Without `copy` it is only to be read: arrays from the object store are read-only and shared."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(tensor.data.copy() if copy else tensor.data).view(getattr(torch, tensor.dtype))


def _digest(name: str, dtype: str, data: np.ndarray) -> str:
    """A CRC-32 of name, dtype, shape and bytes, and the sum of the bytes as 64-bit integers.

    It finds damage and mixed-up tensors; it does not protect against an attacker, and a hash that does takes three
    times as long and more.
    """
    raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    words = raw[: len(raw) // 8 * 8].view(np.uint64)
    head = crc32(f"{name}|{dtype}|{data.shape}".encode())
    return f"{crc32(raw.data, head):08x}{int(words.sum()):016x}"
