"""A weight version on its way from learner to engines: its tensors, its manifest, and what carries them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PublishedTensor:
    """One tensor as it travels: raw bytes in a numpy array, its torch dtype by name, and a digest of the bytes.

    bfloat16 has no numpy type: it travels as uint16 with `dtype == "bfloat16"`. The digest is the sender's, for the
    manifest that follows; empty on the side that receives.
    """

    name: str
    dtype: str
    data: npt.NDArray[Any]
    digest: str = ""


Bucket = tuple[PublishedTensor, ...]
"""Consecutive tensors that travel together."""


@dataclass(frozen=True)
class Manifest:
    """What a weight version is: its scheme's label, (name, digest) of every tensor in order, and their digest."""

    version: int
    scheme: str
    tensors: tuple[tuple[str, str], ...]
    digest: str


@dataclass(frozen=True)
class PublishedWeights:
    """A weight version in this process's memory, as one bucket: a `WeightSource`."""

    manifest: Manifest
    tensors: Bucket

    def buckets(self) -> Iterator[Bucket]:
        yield self.tensors


class WeightSource(Protocol):
    """A weight version on its way from learner to engines; how its bytes travel is the source's affair. Picklable."""

    @property
    def manifest(self) -> Manifest: ...

    def buckets(self) -> Iterator[Bucket]:
        """The manifest's tensors in order, one bucket in memory at a time; may be read again."""
        ...


Tensors = Callable[[], "Iterator[tuple[str, Tensor]]"]
"""The learner's (checkpoint name, tensor) in order, from the beginning at every call. Collective under ZeRO-3."""


class WeightSender(Protocol):
    """The learner's end of a transfer that bypasses the object store."""

    def send(self, receivers: Sequence[Any]) -> list[tuple[str, str]]:
        """Send all tensors to the workers with these handles; returns names and digests of what was sent (rank 0).

        Raises PublicationError when a worker died or refused what was sent, or the connection broke.
        """
        ...


MakeSender = Callable[[int, Tensors], WeightSender]
"""Builds the sender of the learner rank with this number, in that rank's process; picklable."""
