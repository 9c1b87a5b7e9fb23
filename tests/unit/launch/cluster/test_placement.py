"""What the driver waits for at the start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import GetTimeoutError

from launch.cluster.placement import Placement
from qarl.errors import ResourceError
from tests.support.runs import make_config


def test_a_first_rank_that_never_says_where_it_is_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when Ray's process for it is stopped."""

    def get(call: Any, timeout: float | None) -> Any:
        assert timeout == 5.0, "the driver waits forever"
        raise GetTimeoutError

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "remote", lambda _: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=object)))
    placement = object.__new__(Placement)
    config = make_config(learner={"timeout_s": 5.0})
    vars(placement).update(_config=config, _device="cpu", _bundles=[{"CPU": 0.5}], _first_rank=0, _group=None)
    with pytest.raises(ResourceError, match="learner rank 0: Ray started no process for it within 5 s; the same"):
        placement.start_learner(lambda: [])
