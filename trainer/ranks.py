"""The learner ranks, Ray actors, behind the `Learner` protocol."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import GetTimeoutError

from qarl.errors import AGAIN, ActorError, PublicationError, QarlError
from qarl.logs import log_file, tail
from qarl.metrics import merge
from qarl.protocols import UpdateResult
from qarl.quant.parity import Parity
from qarl.quant.scheme import QuantScheme
from qarl.remote import dead, deaths, get, how_it_died
from qarl.types import Activity, TrainSequence
from trainer.weights import SentWeights, StoredWeights, publish_to_store, rank_0s_result

WORDS = {"score": "scoring", "update": "learning", "publish": "publishing", "export": "exporting"}
WORDS |= {
    "parity": "checking",
    "processor_note": "checking",
    "switch": "switching",
    "save": "saving",
    "load": "loading",
}
"""What the ranks do during a call; in any other one they start."""

Logprobs = npt.NDArray[np.float32]


class LearnerGroup:
    """The learner ranks as one `Learner`. Every call goes to all ranks; the constructor waits until they have started.

    Args:
        ranks: handles of `LearnerRank` actors, rank 0 first.
        transfer: returns the handles of the rollout workers that weights are sent to; None publishes through the object
            store.
        timeout_s: longest wait for a call, in seconds.
        transfer_timeout_s: the same for a transfer.
        log_dir: folder of the ranks' logs, which messages name; None for no logs.
    """

    def __init__(
        self,
        ranks: Sequence[Any],
        transfer: Callable[[], list[Any]] | None = None,
        timeout_s: float = 3600.0,
        transfer_timeout_s: float = 600.0,
        log_dir: Path | None = None,
    ) -> None:
        self.ranks, self._transfer, self._log_dir = list(ranks), transfer, log_dir
        self._timeout_s, self._transfer_timeout_s = timeout_s, transfer_timeout_s
        self._call = ""  # that has not ended
        self._all("start")

    def doing(self) -> list[Activity]:
        """What each rank does: all the same, as every call goes to all. Any thread may call this."""
        call = self._call  # another thread may end it
        return [Activity(WORDS.get(call, "starting") if call else "idle")] * len(self.ranks)

    def parity(self) -> list[Parity]:
        """Rank 0's comparison with the engine's ops; empty unless the numerics are the engine's."""
        return self._all("parity")[0]

    def processor_note(self) -> str:
        """A warning about rank 0's processor, or an empty string."""
        return self._all("processor_note")[0]

    def score(
        self, sequences: Sequence[TrainSequence], aligned: bool = True, version: int | None = None
    ) -> list[Logprobs]:
        if not sequences:
            return []
        by_rank: list[dict[int, Logprobs]] = self._all("score", ray.put(list(sequences)), aligned, version)
        merged = {index: row for rows in by_rank for index, row in rows.items()}
        return [merged[index] for index in range(len(sequences))]

    def update(self, minibatches: Sequence[Sequence[TrainSequence]]) -> UpdateResult:
        results = self._all("update", ray.put(list(minibatches)))
        deviations = [deviation for _, of_rank in results for deviation in of_rank]
        metrics = merge(part for parts, _ in results for part in parts)
        return UpdateResult(metrics, float(np.max(deviations)))  # np.max keeps NaN, and raises when there is none

    def publish(self, version: int) -> StoredWeights | SentWeights:
        with self._calling("publish"):
            if self._transfer is None:
                return publish_to_store(self.ranks, version, self._timeout_s)
            workers = self._transfer()
            calls = [rank.send.remote(version, workers) for rank in self.ranks]
            try:
                manifest = rank_0s_result(calls, self._transfer_timeout_s)
            except GetTimeoutError as error:  # NCCL waits forever for a worker that has died
                what = f"did not end within {self._transfer_timeout_s:g} s"
                raise PublicationError(what, f"transfer of weights version {version}", AGAIN) from error
        return SentWeights(manifest, tuple(self.ranks), self._timeout_s)

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
        with self._calling(method):
            return get([getattr(rank, method).remote(*args) for rank in self.ranks], self._timeout_s)

    @contextmanager
    def _calling(self, method: str) -> Iterator[None]:
        """Say what the ranks do meanwhile, and end the run with one line where they fail."""
        self._call = method
        try:
            yield
        except ActorError as error:
            log = tail(log_file(self._log_dir, "rank", 0))
            raise ActorError(error.what, f"learner ranks, {method}", log) from error
        except GetTimeoutError as error:
            logs = [tail(log_file(self._log_dir, "rank", rank)) for rank in range(len(self.ranks))]
            what = "; ".join(filter(None, [f"did not end within {self._timeout_s:g} s", *logs]))
            hint = f"{AGAIN}; raise learner.timeout_s if the ranks were at work"
            raise QarlError(what, f"learner ranks, {method}", hint) from error
        except deaths() as error:
            logs = [tail(log_file(self._log_dir, "rank", rank)) for rank in dead(self.ranks)]
            what = "; ".join(filter(None, [f"a learner rank died during {method} ({how_it_died(error)})", *logs]))
            raise QarlError(what, hint=AGAIN) from error
        finally:
            self._call = ""
