"""A reward server of the user's own."""

import json
from collections.abc import Sequence

from rewards.component import Component, Response
from rewards.endpoint import Endpoint, at_once


class Http(Component):
    """Posts each response as JSON; the server answers `{"reward": number}`. An endpoint that fails raises."""

    def __init__(self, url: str, api_key_env: str, timeout_s: float, max_retries: int, concurrency: int) -> None:
        where = "reward.components.settings.api_key_env"
        self._endpoint = Endpoint(url, api_key_env, timeout_s, max_retries, where)

    def start(self) -> None:
        self._endpoint.check_reachable()

    def judge(self, responses: Sequence[Response]) -> Sequence[float | BaseException]:
        return at_once(self._reward, responses)

    def _reward(self, response: Response) -> float:
        body = {
            "prompt": response.prompt,
            "response": response.text,
            "finish_reason": response.finish_reason,
            "answer": response.answer,
            "answers": list(response.answers),
            "source": response.source,
            "metadata": dict(response.metadata),
        }
        reply = self._endpoint.post(body)
        try:
            return float(json.loads(reply)["reward"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"the reply has no reward: {reply[:200]!r}") from error
