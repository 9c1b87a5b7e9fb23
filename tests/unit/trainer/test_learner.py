"""What a learner rank says when the network refuses."""

from __future__ import annotations

import socket
import sys
from types import ModuleType
from typing import Any, cast

import pytest
import torch

from qarl.errors import ResourceError
from tests.support.runs import make_config
from trainer.learner import _deepspeed_engine
from trainer.policy import Policy


def test_a_port_that_was_taken_since_it_was_chosen_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed, ops = cast(Any, ModuleType("deepspeed")), cast(Any, ModuleType("deepspeed.ops"))
    deepspeed.ops, ops.__compatible_ops__ = ops, {}
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    monkeypatch.setitem(sys.modules, "deepspeed.ops", ops)
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        deepspeed.init_distributed = lambda **_: torch.distributed.TCPStore("127.0.0.1", port, 1, is_master=True)
        with pytest.raises(ResourceError, match=rf"the ranks cannot connect: .*{port}.*; the same command") as caught:
            _deepspeed_engine(cast(Policy, None), make_config(), torch.device("cpu"))
    assert "\n" not in str(caught.value)
