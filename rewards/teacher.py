"""Answers from a teacher model behind an OpenAI-compatible endpoint, fetched by threads while training goes on."""

import threading
from collections.abc import Sequence
from queue import SimpleQueue

from qarl.config.pool import TeacherConfig
from qarl.errors import TeacherError
from qarl.prompts.validate import Validator, Verdict, last_answer
from rewards.endpoint import Endpoint, Rejected, Unreachable, chat_text, chat_url

OF_THE_QUESTION = {400, 413, 422}
"""Statuses that may be about one question, such as one that is too long for the model."""


class Teacher(Validator):
    """The teacher's answer counts; a question without an answer is refused.

    Raises ConfigError: the environment variable of the key is not set, or does not hold a key.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self._config = config
        key, where = config.api_key_env or "", "pool.augment.validator.api_key_env"
        self._endpoint = Endpoint(chat_url(config.base_url), key, config.timeout_s, config.max_retries, where)
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
                except Exception as error:  # noqa: BLE001 - else the thread dies, and the question waits forever
                    fault = TeacherError(f"the request failed: {error!r}", where=self._endpoint.url)
                    fault.__cause__ = error
                    self._results[question] = fault

    def _judge(self, question: str) -> Verdict:
        body = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": self._config.prompt.replace("{question}", question)}],
            "max_tokens": self._config.max_tokens,
            "temperature": 0.0,
        }
        url = self._endpoint.url
        try:
            reply = chat_text(self._endpoint.post(body, is_over=self._closed.wait))
        except Rejected as error:
            if error.status in OF_THE_QUESTION and self._proven:
                return Verdict(None, f"the teacher refuses the question: {error}")
            raise TeacherError(str(error), url, "check base_url, model and key of the teacher") from error
        except Unreachable as error:
            return Verdict(None, f"the teacher cannot be reached: {error}")
        except ValueError as error:
            raise TeacherError(str(error), where=url) from error
        answer = last_answer(reply, self._config.answer_pattern)
        self._proven = True
        return Verdict(answer) if answer else Verdict(None, "the teacher gives no answer")
