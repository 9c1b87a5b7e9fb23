"""A published weight version: in Ray's object store, or sent to the workers by a transfer engine."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from qarl.errors import ActorError, PublicationError
from qarl.remote import as_they_end, get
from qarl.weights.source import Bucket, Manifest
from qarl.weights.wire import make_manifest


@dataclass(frozen=True)
class StoredWeights:
    """A weight version in Ray's object store, one object a bucket: all workers of a node read the same memory.

    A `WeightSource`. The store keeps it as long as someone keeps this: the fleet does, for workers that it may replace.
    """

    manifest: Manifest
    refs: tuple[Any, ...]

    def buckets(self) -> Iterator[Bucket]:
        for ref in self.refs:
            try:
                bucket: Bucket = ray.get(ref)
            except (RayError, ActorError) as error:
                what = f"a bucket is lost, as when the rank that made it has died ({type(error).__name__})"
                raise PublicationError(what) from error
            yield bucket


@dataclass(frozen=True)
class SentWeights:
    """A weight version that a transfer engine has brought to every worker; a worker that starts later asks the learner.

    A `WeightSource`. It can be read only while the learner has these weights, from a publication to the next update.
    """

    manifest: Manifest
    ranks: tuple[Any, ...]
    timeout_s: float
    """Longest wait for a rank that is asked."""

    def buckets(self) -> Iterator[Bucket]:
        try:
            stored = publish_to_store(self.ranks, self.manifest.version, self.timeout_s)
        except (RayError, ActorError) as error:
            raise PublicationError(f"the learner does not give its weights ({type(error).__name__})") from error
        return stored.buckets()


def store(buckets: Iterable[Bucket], version: int, scheme: str) -> StoredWeights:
    """Put `buckets` into the object store one by one. `scheme` is the label of the tensors' format."""
    refs, digests = [], list[tuple[str, str]]()
    for bucket in buckets:
        refs.append(ray.put(bucket))
        digests += [(tensor.name, tensor.digest) for tensor in bucket]
        del bucket  # before the next one is packed
    return StoredWeights(make_manifest(version, scheme, digests), tuple(refs))


def publish_to_store(ranks: Sequence[Any], version: int, timeout_s: float) -> StoredWeights:
    """Let the learner ranks with these handles, rank 0 first, put their current weights into the object store.

    Raises what `rank_0s_result` does.
    """
    weights: StoredWeights = rank_0s_result([rank.publish.remote(version) for rank in ranks], timeout_s)
    return weights


def rank_0s_result(calls: Sequence[Any], timeout_s: float) -> Any:
    """What rank 0 returned, once all ranks have ended. `calls` has one reference for each rank, rank 0 first.

    Raises:
        QarlError: what the first rank that failed raised.
        GetTimeoutError: no rank ended within `timeout_s`.
    """
    results = {call: get(call) for call in as_they_end(calls, timeout_s)}
    return results[calls[0]]
