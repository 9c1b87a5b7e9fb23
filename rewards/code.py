"""Programs that must pass tests, each run in a process with limits (rewards/sandbox.py says what they guard)."""

import contextlib
import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards import sandbox
from rewards.component import Component, Response

BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
Test = Mapping[str, str]
"""Standard input and the output that it must give: {"input", "output"}."""


class Code(Component):
    """1.0 when the last code block of a response (without one, the whole response) passes all tests of its row."""

    def __init__(
        self,
        tests: str,
        partial: bool,
        python: str,
        timeout_s: float,
        memory_mib: int,
        file_mib: int,
        network: bool,
    ) -> None:
        self._field, self._partial, self._timeout_s = tests, partial, timeout_s
        self._python, self._most_output = python or sys.executable, file_mib * 2**20
        self._limits = json.dumps(
            {
                "cpu_s": math.ceil(timeout_s),
                "memory": memory_mib * 2**20,
                "file": self._most_output,
                "network": network,
            }
        )

    def start(self) -> None:
        """Raises OSError: no program runs here, or not without the network."""
        code, output = self._run("print(6 * 7)", "")
        if code == sandbox.NO_NETWORK:
            raise OSError(
                "this host permits no network namespace; set the setting network to true to run code with one"
            )
        if (code, output) != (0, "42\n"):
            raise OSError(f"{self._python} cannot run a program within the limits (exit code {code})")

    def check(self, response: Response) -> None:
        tests = self._tests(response)
        if isinstance(tests, str):
            compile(tests, "tests", "exec")

    def judge(self, responses: Sequence[Response]) -> Sequence[float]:
        return [self._passed(response) for response in responses]

    def _passed(self, response: Response) -> float:
        blocks = BLOCK.findall(response.text)
        program, tests = blocks[-1] if blocks else response.text, self._tests(response)
        if isinstance(tests, str):
            done = secrets.token_hex(16)  # a program that ends before its tests does not print it
            code, output = self._run(f"{program}\n\n{tests}\n\nprint({done!r})\n", "")
            return float(code == 0 and output.endswith(f"{done}\n"))
        passed = 0
        for test in tests:
            code, output = self._run(program, test["input"])
            if code == 0 and output.split() == test["output"].split():
                passed += 1
            elif not self._partial:
                return 0.0
        return passed / len(tests)

    def _tests(self, response: Response) -> str | Sequence[Test]:
        """Raises ValueError: the row has no tests."""
        tests: Any = response.metadata.get(self._field) if self._field else response.answer
        if isinstance(tests, str) and tests.lstrip().startswith("["):
            tests = json.loads(tests)
        if isinstance(tests, str) and tests.strip():
            return tests
        if isinstance(tests, Mapping) and "inputs" in tests:  # as APPS and TACO have them
            tests = [{"input": i, "output": o} for i, o in zip(tests["inputs"], tests["outputs"], strict=True)]
        if isinstance(tests, Sequence) and tests and all(isinstance(test, str) for test in tests):
            return "\n".join(tests)  # as MBPP has them
        if not isinstance(tests, Sequence) or not tests or not all({"input", "output"} <= set(test) for test in tests):
            raise ValueError(f"the row has no tests in {self._field or 'its answer'}")
        return tests

    def _run(self, program: str, given: str) -> tuple[int, str]:
        """Exit code (minus a signal's number) and output of `program`, which must end within the time."""
        with tempfile.TemporaryDirectory(prefix="qarl-code-") as folder, tempfile.TemporaryFile() as output:
            file = Path(folder, "program.py")
            file.write_text(program, errors="surrogatepass")
            command = [sys.executable, "-I", "-S", sandbox.__file__, self._limits, self._python, str(file)]
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                start_new_session=True,
            )
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(given.encode(errors="replace"), timeout=self._timeout_s)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with all that it started
                process.wait()
            output.seek(0)
            return process.returncode, output.read(self._most_output).decode(errors="replace")
