"""A language model as judge, behind an OpenAI-compatible endpoint."""

import hashlib
import json
import re
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from threading import Lock
from typing import Any

from qarl.errors import ConfigError
from rewards.component import Component, Response
from rewards.endpoint import Endpoint, at_once, chat_text, chat_url


class Judge(Component):
    """Asks the judge about each response; its score becomes a reward in [0, 1].

    A reply without a score, an endpoint that fails and a spent budget raise.
    """

    def __init__(self, *, base_url: str, model: str, template: str, pattern: str, cache: str, **settings: Any) -> None:
        self._model, self._template, self._pattern = model, template, re.compile(pattern)
        self._lowest, self._highest, self._max_tokens = (settings[k] for k in ("lowest", "highest", "max_tokens"))
        key = settings["api_key_env"]
        where = "reward.components.settings.api_key_env"
        self._endpoint = Endpoint(chat_url(base_url), key, settings["timeout_s"], settings["max_retries"], where)
        self._replies = Replies(cache, settings["budget"])

    def start(self) -> None:
        self._replies.open()
        self._endpoint.check_reachable()

    def judge(self, responses: Sequence[Response]) -> Sequence[float | BaseException]:
        return at_once(self._score, responses)

    def _score(self, response: Response) -> float:
        values = {"prompt": response.prompt, "response": response.text, "answer": response.answer}
        question = re.sub(r"\{(prompt|response|answer)\}", lambda match: values[match[1]], self._template)
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": self._max_tokens,
            "temperature": 0.0,
        }
        reply = self._replies.get(body)
        if reply is None:
            self._replies.spend()
            reply = chat_text(self._endpoint.post(body))
            self._replies.put(body, reply)
        scores = self._pattern.findall(reply)
        if not scores:
            raise ValueError(f"the judge gives no score: {reply[-200:]!r}")
        score = min(max(float(scores[-1]), self._lowest), self._highest)
        return (score - self._lowest) / (self._highest - self._lowest)


class Replies:
    """Replies by request, and the number of requests, in an SQLite file, which processes share, or in memory."""

    def __init__(self, file: str, budget: int) -> None:
        self._file, self._budget = file or ":memory:", budget
        self._lock = Lock()

    def open(self) -> None:
        """Raises ConfigError: the file cannot be used."""
        try:
            self._database = sqlite3.connect(self._file, timeout=60.0, check_same_thread=False, isolation_level=None)
            self._run("CREATE TABLE IF NOT EXISTS replies (request TEXT PRIMARY KEY, reply TEXT)")
            self._run("CREATE TABLE IF NOT EXISTS spent (one INTEGER PRIMARY KEY CHECK (one = 1), requests INTEGER)")
            self._run("INSERT OR IGNORE INTO spent VALUES (1, 0)")
        except sqlite3.Error as error:
            raise ConfigError(f"{self._file}: {error}", "the judge's cache", "name another file") from error

    def get(self, body: Any) -> str | None:
        rows = self._run("SELECT reply FROM replies WHERE request = ?", _digest(body))
        return str(rows[0][0]) if rows else None

    def put(self, body: Any, reply: str) -> None:
        self._run("INSERT OR REPLACE INTO replies VALUES (?, ?)", _digest(body), reply)

    def spend(self) -> None:
        """Count a request. Raises ValueError: the budget is spent."""
        limit = self._budget or 2**62
        if not self._run("UPDATE spent SET requests = requests + 1 WHERE requests < ? RETURNING requests", limit):
            raise ValueError(f"the budget of {self._budget} requests is spent")

    def _run(self, command: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock, closing(self._database.execute(command, values)) as cursor:
            return cursor.fetchall()


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
