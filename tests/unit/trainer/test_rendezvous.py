"""What a learner rank says when the network refuses."""

from __future__ import annotations

import os
import socket
from unittest.mock import patch

import pytest
from torch import distributed

from qarl.errors import ResourceError
from trainer.rendezvous import join_ranks, set_environment


@pytest.mark.parametrize("is_taken", [True, False])
def test_a_port_that_was_taken_since_it_was_chosen_is_one_line(monkeypatch: pytest.MonkeyPatch, is_taken: bool) -> None:
    monkeypatch.setattr(distributed, "is_initialized", lambda: False)  # another test has an engine
    joined: list[object] = []
    monkeypatch.setattr(distributed, "init_process_group", lambda backend, **_: joined.append(backend))
    with socket.create_server(("127.0.0.1", 0)) as other, patch.dict(os.environ):
        port = other.getsockname()[1]
        if not is_taken:
            other.close()
        set_environment(0, 1, f"127.0.0.1:{port}")
        assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
        if not is_taken:
            join_ranks("cpu")
            assert joined == ["gloo"]
            return
        with pytest.raises(ResourceError, match=rf"the ranks cannot connect: .*{port}.*; the same command") as caught:
            join_ranks("cpu")
    assert "\n" not in str(caught.value)
    assert joined == []
