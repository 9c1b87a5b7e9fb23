"""Answers from a teacher model behind an OpenAI-compatible endpoint, fetched by threads while training goes on."""

import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from queue import SimpleQueue

from qarl.config.pool import TeacherConfig
from qarl.errors import ConfigError, TeacherError
from qarl.prompts.validate import Validator, Verdict, last_answer

FIRST_PAUSE_S = 1.0
"""Before the first retry; each further pause is twice as long, up to LONGEST_PAUSE_S."""
LONGEST_PAUSE_S = 60.0
TRY_AGAIN = {408, 429}
"""Statuses that may change with time, as those from 500 on."""
OF_THE_QUESTION = {400, 413, 422}
"""Statuses that may be about one question, such as one that is too long for the model."""


class Teacher(Validator):
    """The teacher's answer counts; a question without an answer is refused.

    Raises ConfigError: the environment variable of the key is not set, or does not hold a key.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self._config = config
        self._headers = {"Content-Type": "application/json"}
        if config.api_key_env:
            self._headers["Authorization"] = f"Bearer {api_key(config.api_key_env)}"
        self._url = f"{config.base_url.rstrip('/')}/chat/completions"
        self._closed = threading.Event()
        self._proven = False  # whether the endpoint has ever answered
        self._questions: SimpleQueue[str] = SimpleQueue()
        self._results: dict[str, Verdict | TeacherError] = {}
        for _ in range(config.concurrency):
            threading.Thread(target=self._work, name="teacher", daemon=True).start()

    def submit(self, question: str) -> None:
        self._questions.put(question)

    def verdict(self, question: str, replies: Sequence[str]) -> Verdict | None:
        """Raises TeacherError when the endpoint cannot answer any question."""
        result = self._results.pop(question, None)
        if isinstance(result, TeacherError):
            raise result
        return result

    def close(self) -> None:
        """Send no further question; an answer that is on its way is dropped."""
        self._closed.set()
        for _ in range(self._config.concurrency):
            self._questions.put("")

    def _work(self) -> None:
        while not self._closed.is_set():
            if question := self._questions.get():
                try:
                    self._results[question] = self._judge(question)
                except TeacherError as error:
                    self._results[question] = error
                except Exception as error:  # noqa: BLE001 - otherwise the thread dies and the queue waits forever
                    self._results[question] = TeacherError(f"the request failed: {error!r}", where=self._url)

    def _judge(self, question: str) -> Verdict:
        fault = "closed"
        for pause in [0.0, *(min(FIRST_PAUSE_S * 2**i, LONGEST_PAUSE_S) for i in range(self._config.max_retries))]:
            if self._closed.wait(pause):
                break
            try:
                answer = last_answer(self._ask(question), self._config.answer_pattern)
                self._proven = True
                return Verdict(answer) if answer else Verdict(None, "the teacher gives no answer")
            except urllib.error.HTTPError as error:
                fault = f"status {error.code}"
                if error.code in OF_THE_QUESTION and self._proven:
                    return Verdict(None, f"the teacher refuses the question: {fault}")
                if error.code < 500 and error.code not in TRY_AGAIN:
                    raise TeacherError(fault, self._url, "check base_url, model and key of the teacher") from error
            except (OSError, HTTPException) as error:  # time-outs and lost connections
                fault = f"{type(error).__name__}: {error}"
        return Verdict(None, f"the teacher cannot be reached: {fault}")

    def _ask(self, question: str) -> str:
        body = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": self._config.prompt.replace("{question}", question)}],
            "max_tokens": self._config.max_tokens,
            "temperature": 0.0,
        }
        request = urllib.request.Request(self._url, json.dumps(body).encode(), self._headers)
        with urllib.request.urlopen(request, timeout=self._config.timeout_s) as response:
            text = response.read()
        try:
            return str(json.loads(text)["choices"][0]["message"]["content"] or "")  # null when it was cut short
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise TeacherError(f"its reply is not a chat completion ({error!r})", where=self._url) from error


def api_key(variable: str) -> str:
    where = "pool.augment.validator.api_key_env"
    if variable not in os.environ:
        raise ConfigError(f"{variable} is not set", where, hint="export it, or name another variable")
    key = os.environ[variable]
    if not key or not key.isascii() or not key.isprintable():
        what = f"{variable} is empty, or has a line end or other characters that no key has"
        raise ConfigError(what, where, hint="export the key alone")
    return key
