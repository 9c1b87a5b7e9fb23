"""The learner as a whole: its ranks as Ray actors, behind the Learner protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import RayError

from qarl.errors import PublicationError, QarlError
from qarl.metrics import Value, merge
from qarl.quant.parity import Parity
from qarl.quant.scheme import QuantScheme
from qarl.remote import as_they_end, deaths, get
from qarl.types import TrainSequence
from qarl.weights.source import Bucket, Manifest

Logprobs = npt.NDArray[np.float32]


@dataclass(frozen=True)
class StoredWeights:
    """A weight version in Ray's object store, one object a bucket: every worker of a node reads the same memory.

    A `WeightSource`. It lives as long as it is kept: by the fleet, for workers that it may replace.
    """

    manifest: Manifest
    refs: tuple[Any, ...]

    def buckets(self) -> Iterator[Bucket]:
        for ref in self.refs:
            try:
                bucket: Bucket = ray.get(ref)
            except RayError as error:
                raise PublicationError(f"a bucket is lost ({type(error).__name__})") from error
            yield bucket


@dataclass(frozen=True)
class SentWeights:
    """A weight version that a transfer engine has brought to every worker; a later worker asks the learner for it.

    A `WeightSource`. To be read only while the learner has these weights, from a publication to the next update.
    """

    manifest: Manifest
    ranks: tuple[Any, ...]

    def buckets(self) -> Iterator[Bucket]:
        return _stored(self.ranks, self.manifest.version).buckets()


class LearnerGroup:
    """Handles of `LearnerRank` actors; every call goes to all of them, rank 0 first. Waits until they have started.

    Args:
        ranks: the handles.
        transfer: gives the handles of the rollout workers that vLLM's transfer engine sends to; without it weights go
            through the object store.
        timeout_s: longest wait for a transfer.
    """

    def __init__(
        self, ranks: Sequence[Any], transfer: Callable[[], list[Any]] | None = None, timeout_s: float = 600.0
    ) -> None:
        self.ranks, self._transfer, self._timeout_s = list(ranks), transfer, timeout_s
        self._all("start")

    def parity(self) -> list[Parity]:
        """Rank 0's comparison with the engine's ops; empty when the profile does not claim to equal them."""
        result: list[Parity] = self._all("parity")[0]
        return result

    def processor_note(self) -> str:
        """What the user should know of rank 0's processor; empty for nothing."""
        result: str = self._all("processor_note")[0]
        return result

    def score(self, sequences: Sequence[TrainSequence], aligned: bool = True) -> list[Logprobs]:
        if not sequences:
            return []
        shares: list[dict[int, Logprobs]] = self._all("score", ray.put(list(sequences)), aligned)
        merged = {index: row for share in shares for index, row in share.items()}
        return [merged[index] for index in range(len(sequences))]

    def update(
        self, minibatches: Sequence[Sequence[TrainSequence]], prox_T: Sequence[Sequence[Logprobs]]
    ) -> dict[str, Value]:
        parts = self._all("update", ray.put(list(minibatches)), ray.put(list(prox_T)))
        return merge(part for rank in parts for part in rank)

    def publish(self, version: int) -> StoredWeights | SentWeights:
        with _readable_errors("publish"):
            if self._transfer is None:
                return _stored(self.ranks, version)
            receivers = self._transfer()
            running = [rank.send.remote(version, receivers) for rank in self.ranks]
            try:
                manifests = [get(ended) for ended in as_they_end(running, self._timeout_s)]
            except TimeoutError as error:  # NCCL waits for ever for a worker that has died
                raise PublicationError(
                    f"was not through within {self._timeout_s:g} s",
                    where=f"transfer of weights version {version}",
                    mend="the same command continues from the last checkpoint",
                ) from error
        return SentWeights(next(filter(None, manifests)), tuple(self.ranks))

    def switch(self, scheme: QuantScheme) -> bool:
        self._all("switch", scheme)
        checks = self.parity()
        return bool(checks) and all(check.exact for check in checks)

    def save(self, directory: str) -> None:
        self._all("save", directory)

    def load(self, directory: str) -> None:
        self._all("load", directory)

    def export(self, directory: str, quantized: bool) -> None:
        self._all("export", directory, quantized)

    def close(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = []

    def _all(self, method: str, *args: Any) -> list[Any]:
        with _readable_errors(method):
            return get([getattr(rank, method).remote(*args) for rank in self.ranks])


def _stored(ranks: Sequence[Any], version: int) -> StoredWeights:
    """The ranks' current weights in the object store."""
    streams = [rank.publish.options(num_returns="streaming").remote(version) for rank in ranks]
    running = [stream.completed() for stream in streams]
    order = dict(zip(running, streams, strict=True))
    for ended in as_they_end(running):
        refs = list(order[ended])
        last = get(refs[-1:])  # raises what the rank raised
        if last:
            manifest, buckets = last[0], refs[:-1]
    return StoredWeights(manifest, tuple(buckets))


@contextmanager
def _readable_errors(method: str) -> Iterator[None]:
    try:
        yield
    except deaths() as error:
        raise QarlError(
            f"a learner rank died during {method} ({type(error).__name__})",
            mend="the same command continues from the last checkpoint",
        ) from error
