"""A weight version on its way from the learner to the engines: its tensors, its manifest, and how they travel."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PublishedTensor:
    """One tensor as it travels: raw bytes in a numpy array, its torch dtype by name, and a digest of the bytes.

    numpy has no bfloat16: such a tensor travels as uint16 with `dtype == "bfloat16"`. The sender computes the digest,
    for the manifest; on the receiving side it is empty.
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


class WeightSource(Protocol):
    """A weight version that an engine can read, wherever its bytes are. Picklable."""

    @property
    def manifest(self) -> Manifest: ...

    def buckets(self) -> Iterator[Bucket]:
        """The manifest's tensors in order, one bucket in memory at a time. Every call starts again."""
        ...


@dataclass(frozen=True)
class PublishedWeights:
    """A weight version in this process's memory, as one bucket: a `WeightSource`."""

    manifest: Manifest
    tensors: Bucket

    def buckets(self) -> Iterator[Bucket]:
        yield self.tensors


Transport = Literal["nccl", "ipc"]
"""The values of `rollout.transport` that send weights straight to the workers, not through Ray's object store."""


@dataclass(frozen=True)
class Channel:
    """The connection that a learner opens to its workers, as one worker needs it to connect.

    `settings` are those of the transfer engine that both sides use; `worker` counts the workers from 0.
    """

    worker: int
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class TransferStep:
    """One step of a transfer. A weight version takes a `begin`, one or more `tensors`, and an `end`.

    `tensors` describes to the transfer engine what it receives in this step: names, dtypes, shapes.
    """

    kind: Literal["begin", "tensors", "end"]
    tensors: Mapping[str, Any] = field(default_factory=dict)


Tensors = Callable[[], "Iterator[tuple[str, Tensor]]"]
"""The learner's (checkpoint name, tensor) in order, from the beginning at every call. Collective under ZeRO-3."""


class WeightSender(Protocol):
    """The learner's side of a transfer."""

    def send(self, workers: Sequence[Any]) -> list[tuple[str, str]]:
        """Send all tensors to the workers with these Ray handles; rank 0 returns (name, digest) of each.

        Raises PublicationError: a worker died or refused what was sent, or the connection broke.
        """
        ...


MakeSender = Callable[[int, Tensors], WeightSender]
"""Builds the sender of the learner rank with this number, in that rank's process; picklable."""
