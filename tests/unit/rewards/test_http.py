from __future__ import annotations

import json

from qarl.config.reward import HttpSettings
from rewards.http import Http
from tests.support.chat_server import serving
from tests.support.rewards import response


def test_a_reward_server_gets_the_sample_and_gives_a_number() -> None:
    with serving() as stub:
        stub.plans = {"a": [json.dumps({"reward": -2.5}).encode()], "b": [b"{}"]}
        url = f"http://127.0.0.1:{stub.server_port}/score"
        server = Http(**HttpSettings(url=url).model_dump())
        server.start()
        first, second = server.judge([response("a", "4", "four", source="s", metadata={"level": 2}), response("b")])
        assert first == -2.5
        assert "the reply has no reward" in str(second)
        body = next(body for body in stub.bodies if body["response"] == "a")
        assert stub.paths[0] == "/score"
    assert (body["answers"], body["source"], body["metadata"]) == (["4", "four"], "s", {"level": 2})
    assert (body["prompt"], body["finish_reason"]) == ("the prompt of p", "stop")
