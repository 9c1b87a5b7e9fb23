from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qarl.config.run import RewardConfig
from qarl.errors import DataError, QarlError
from qarl.protocols import RewardService
from qarl.types import Prompt, Sample, Score
from rewards.exact import is_exact
from rewards.service import KILLED, ProcessRewardService

ROOT = Path(__file__).parents[3]

VERIFIERS = '''
import os, signal, sys, time

def verify(text, finish_reason, answer):
    """Does what `text` says; right when that is nothing and `answer` is "right"."""
    if text == "print":
        print("noise on stdout", flush=True)
    if text == "raise":
        raise ValueError("two\\nlines")
    if text == "pid":
        raise ValueError(os.getpid())
    if text == "hang":
        time.sleep(1000)
    if text == "exit":
        os._exit(3)
    if text == "leave":
        sys.exit(4)
    if text == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == "killed" or text.startswith("killed once") and not os.path.exists(text):
        open(text, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "two":
        return 2.0
    if text == "slow":
        time.sleep(0.3)
    if text.startswith("/"):
        with open(text, "w") as file:
            file.write(str(os.getpid()))
        if answer == "hang":
            time.sleep(1000)
    return float(answer == "right")
'''

# What the verifier above makes of a text, for the answer "right".
FAILURES = {
    "raise": "raised ValueError: two lines",
    "two": "gave 2, and a success is in [0, 1]",
    "exit": "process exited with code 3",
    "leave": "raised SystemExit: 4",
    "segv": "process was killed by SIGSEGV",
}


def make_sample(text: str, answer: str = "right", prompt_id: str = "p", finish_reason: str = "stop") -> Sample:
    prompt = Prompt(id=prompt_id, text="", answer=answer, token_ids=(1,))
    return Sample(prompt, (2,), np.zeros(1, np.float32), text, finish_reason, version=0)


KILLED_ONCE = """
import os, signal
from contextlib import suppress
from pathlib import Path
from toy_verifier import verify

with suppress(FileExistsError):
    Path(__file__ + ".seen").touch(exist_ok=False)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module", autouse=True)
def verifier_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("verifiers")
    (folder / "toy_verifier.py").write_text(VERIFIERS)
    (folder / "slow_start.py").write_text("import time\ntime.sleep(1.0)\nfrom toy_verifier import verify\n")
    (folder / "dead_start.py").write_text("import os\nos._exit(7)\n")
    (folder / "killed_once.py").write_text(KILLED_ONCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


def make_service(
    faults: list[str], workers: int = 2, timeout_s: float = 5.0, module: str = "toy_verifier"
) -> ProcessRewardService:
    return ProcessRewardService(toy(workers, timeout_s=timeout_s, function=f"{module}:verify"), faults.append)


def toy(workers: int = 1, function: str = "toy_verifier:verify", **settings: Any) -> RewardConfig:
    return RewardConfig(kind="custom", function=function, num_workers=workers, **settings)


# --- rows with a verifier's arguments of their own


def test_the_arguments_of_a_row_reach_its_verifier(tmp_path: Path) -> None:
    row = '{"dataset": "chain_sum", "settings": {}, "entry": {"answer": "12"}, "answer_pattern": "[0-9]+"}'
    prompts = [replace(make_sample("").prompt, verifier_kwargs=json.loads(row)), make_sample("").prompt]
    samples = [replace(make_sample("So it is 12."), prompt=prompt) for prompt in prompts]
    faults: list[str] = []
    with ProcessRewardService(RewardConfig(kind="reasoning_gym"), faults.append) as service:
        scores = service.score(samples)
    assert scores[0] == Score(1.0)
    assert scores[1].reward == 0.0
    assert "missing 4 required keyword-only arguments" in scores[1].error
    assert len(faults) == 1


# --- exact


@given(text=st.text(), answer=st.text())
def test_exact_wants_the_whole_completion(text: str, answer: str) -> None:
    assert is_exact(text, "stop", [answer]) == float(text == answer)
    assert is_exact(answer, "stop", ["other", answer]) == 1.0
    assert is_exact(answer, "length", [answer]) == 0.0
    assert is_exact(answer + " ", "stop", [answer]) == 0.0


# --- service


@pytest.fixture(scope="module")
def shared_faults() -> list[str]:
    return []


@pytest.fixture(scope="module")
def service(shared_faults: list[str], verifier_modules: None) -> Iterator[ProcessRewardService]:
    with make_service(shared_faults) as made:
        yield made


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_scores_keep_order_and_each_failure_is_one_line(
    service: ProcessRewardService, shared_faults: list[str], data: st.DataObject
) -> None:
    outcomes = st.sampled_from(["", "no", "print", *FAILURES])
    texts = data.draw(st.lists(outcomes, max_size=12))
    samples = [make_sample(text, "wrong" if text == "no" else "right", f"p{i}") for i, text in enumerate(texts)]
    shared_faults.clear()

    scores = service.score(samples)

    assert scores == [Score(float(text in ("", "print")), FAILURES.get(text, "")) for text in texts]
    assert sorted(shared_faults) == sorted(
        f"prompt p{i}: reward 'custom' {FAILURES[text]}; it counts 0"
        for i, text in enumerate(texts)
        if text in FAILURES
    )


def test_who_judges_is_known_meanwhile(service: ProcessRewardService) -> None:
    with ThreadPoolExecutor(1) as thread:
        scores = thread.submit(service.score, [make_sample("slow", "right")])
        while not any(one.word == "judging" for one in service.doing()):
            assert not scores.done()
    assert {one.word for one in service.doing()} == {"idle"}


def test_large_batch_keeps_order(service: ProcessRewardService) -> None:
    right = [i % 3 == 0 for i in range(300)]
    samples = [make_sample("x" * 20_000, "right" if r else "wrong") for r in right]
    assert [score.reward for score in service.score(samples)] == [float(r) for r in right]


@pytest.mark.parametrize(("text", "survives"), [("raise", True), ("two", True), ("leave", True), ("exit", False)])
def test_only_a_process_that_died_is_replaced(text: str, survives: bool) -> None:
    with make_service([], workers=1) as service:
        before, _, after = service.score([make_sample("pid"), make_sample(text), make_sample("pid")])
    assert (before == after) == survives


def test_a_verifier_that_hangs_is_killed_and_replaced() -> None:
    faults: list[str] = []
    texts = ["", "hang", "", "", "hang", ""]
    with make_service(faults, timeout_s=1.0) as service:
        scores = service.score([make_sample(text, prompt_id=f"p{i}") for i, text in enumerate(texts)])
        again = service.score([make_sample("")] * 4)
    late = Score(0.0, "timed out after 1 s")
    assert scores == [late if text else Score(1.0) for text in texts]
    assert sorted(faults) == [f"prompt p{i}: reward 'custom' timed out after 1 s; it counts 0" for i in (1, 4)]
    assert again == [Score(1.0)] * 4


def test_a_verifier_that_never_lets_go_of_the_interpreter_is_killed() -> None:
    faults: list[str] = []
    with ProcessRewardService(RewardConfig(kind="math", timeout_s=2.0), faults.append) as service:
        scores = service.score([make_sample(r"\boxed{9^{9^{9^9}}}", "72"), make_sample("so 72", "72")])
    assert scores == [Score(0.0, "timed out after 2 s"), Score(1.0)]
    assert len(faults) == 1


def test_the_time_out_is_per_sample_and_leaves_out_the_start() -> None:
    faults: list[str] = []
    # One process, chunks of several samples: a chunk takes longer than the time-out, and so does the start.
    with make_service(faults, workers=1, timeout_s=0.7, module="slow_start") as service:
        assert service.score([make_sample("slow")] * 6) == [Score(1.0)] * 6
    assert faults == []


def test_what_verifiers_print_and_raise_is_in_their_logs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    faults: list[str] = []
    with ProcessRewardService(toy(), faults.append, log_dir=tmp_path) as service:
        service.score([make_sample("print"), make_sample("raise"), make_sample("segv"), make_sample("raise")])
    text = (tmp_path / "verifier-0.log").read_text()
    assert "noise on stdout\n" in text
    assert text.count("WARNING rewards.child: the verifier raised\nTraceback") == 2
    assert text.count("ValueError: two") == 2
    assert len(faults) == 3
    assert capfd.readouterr() == ("", "")


def test_a_verifier_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    with pytest.raises(QarlError, match="exited with code 7") as caught:
        ProcessRewardService(toy(function="dead_start:verify"), pytest.fail, log_dir=tmp_path)
    assert f"its log {tmp_path / 'verifier-0.log'} ends with: " in caught.value.hint


def test_a_process_killed_while_it_starts_is_started_again() -> None:
    with make_service([], module="killed_once") as service:
        assert service.score([make_sample("a")] * 2) == [Score(1.0)] * 2


@pytest.mark.parametrize("kind", ["exact", "math"])
def test_config_names_the_verifier(kind: str) -> None:
    with ProcessRewardService(RewardConfig.model_validate({"kind": kind}), pytest.fail) as service:
        scores = service.score([make_sample("72", "72"), make_sample("so 72", "72"), make_sample("", "72")])
    assert [score.reward for score in scores] == [1.0, float(kind == "math"), 0.0]


@pytest.mark.parametrize(
    ("verifier", "reason"),
    [
        ("no_such_module:verify", "No module named 'no_such_module'"),
        ("toy_verifier:absent", "has no attribute 'absent'"),
        ("dead_start:verify", "exited with code 7"),
    ],
)
def test_a_process_that_cannot_start_is_an_error(verifier: str, reason: str) -> None:
    with pytest.raises(QarlError, match=f"{verifier}: verifier process could not start: .*{reason}"):
        ProcessRewardService(toy(2, function=verifier), pytest.fail)


def test_an_interrupted_call_leaves_nothing_for_the_next() -> None:
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with ProcessRewardService(toy(2), interrupt) as service:
        with pytest.raises(KeyboardInterrupt):
            service.score([make_sample("raise")] + [make_sample("", "wrong")] * 20)
        assert service.score([make_sample("")] * 20) == [Score(1.0)] * 20


def test_a_process_that_died_idle_is_replaced() -> None:
    with make_service([], workers=1) as service:
        (score,) = service.score([make_sample("pid")])
        os.kill(int(score.error.split()[-1]), signal.SIGKILL)
        wait_for_end(int(score.error.split()[-1]))
        assert service.score([make_sample("")]) == [Score(1.0)]


def test_a_sample_whose_process_is_killed_is_tried_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever kills a verifier from outside does not change the rewards, and so not the run."""
    monkeypatch.chdir(tmp_path)
    faults: list[str] = []
    with make_service(faults, workers=2) as service:
        scores = service.score([make_sample(text) for text in ("", "killed once", "killed", "killed once too", "")])
    assert scores == [Score(1.0), Score(1.0), Score(0.0, KILLED), Score(1.0), Score(1.0)]
    assert faults == [f"prompt p: reward 'custom' {KILLED}; it counts 0"]


def test_close_leaves_no_process() -> None:
    service: RewardService = make_service([])
    pids = {int(score.error.split()[-1]) for score in service.score([make_sample("pid")] * 40)}
    service.close()
    service.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(QarlError, match="closed"):
        service.score([make_sample("")])


def wait_for_end(pid: int, limit_s: float = 30.0) -> None:
    """Until the process has ended; a zombie, which only its parent can remove, has."""
    stat = Path(f"/proc/{pid}/stat")
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} still lives")


PARENT = """
import sys, time
from qarl.config.run import RewardConfig
from qarl.protocols import RewardService
from qarl.types import Prompt, Sample
from rewards.service import KILLED, ProcessRewardService
config = RewardConfig(kind="custom", function="toy_verifier:verify", timeout_s=1.0)
service = ProcessRewardService(config, print)
service.score([Sample(Prompt("p", "", sys.argv[2], (1,)), (2,), None, sys.argv[1], "stop", 0)])
time.sleep(1000)
"""


@pytest.mark.parametrize("answer", ["right", "hang"])
def test_processes_end_when_the_parent_is_killed(tmp_path: Path, answer: str) -> None:
    note = tmp_path / "pid"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(note), answer], env=env, cwd=ROOT)
    try:
        for _ in range(600):
            if note.exists() and note.read_text():
                break
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()
    wait_for_end(int(note.read_text()))


def test_verifier_processes_import_nothing_heavy() -> None:
    heavy = "{'torch', 'ray', 'numpy', 'pydantic', 'omegaconf', 'vllm'} & set(sys.modules)"
    code = f"import sys, rewards.child, rewards.exact, rewards.math; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_reward_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "def judge(text, finish_reason, answer, right): return right if text == answer else 1 / 0"
    )
    config = RewardConfig.model_validate({"kind": "custom", "function": "mine.py:judge", "kwargs": {"right": 0.75}})
    faults: list[str] = []
    with ProcessRewardService(config, faults.append) as service:
        scores = service.score([make_sample("2", "2"), make_sample("3", "2")])
    assert [score.reward for score in scores] == [0.75, 0.0]
    assert len(faults) == 1
    assert "ZeroDivisionError" in faults[0]


# --- several components


MINE = """
def graded(text, finish_reason, answer):
    return {"big": 7.5, "nan": float("nan"), "half": 0.5}.get(text, 0.0)

def groups(responses):
    assert len({r.prompt_id for r in responses}) == 1
    if responses[0].text == "raise":
        raise ValueError("no")
    return [len(responses) + index for index in range(len(responses))]

def batches(responses):
    return [float(len(responses))] * len(responses)
"""


def several(folder: Path, *parts: dict[str, Any], **settings: Any) -> RewardConfig:
    """A config; a name of a function of MINE is short for its component."""
    (folder / "own.py").write_text(MINE)
    for part in parts:
        if name := part.pop("own", ""):
            function = {"function": f"{folder}/own.py:{name}"}
            part |= {"kind": "custom", "name": name, "settings": function | part.get("settings", {})}
    return RewardConfig.model_validate({"components": list(parts), **settings})


def test_the_reward_is_the_weighted_sum_and_the_first_component_the_success(tmp_path: Path) -> None:
    config = several(tmp_path, {"kind": "exact", "weight": 2.0}, {"own": "graded", "weight": -0.1})
    faults: list[str] = []
    with ProcessRewardService(config, faults.append) as service:
        big, right, bad = service.score([make_sample("big"), make_sample("right"), make_sample("nan", prompt_id="q")])
    assert (big.reward, big.solved) == (pytest.approx(-0.75), 0.0)
    assert dict(big.components) == {"exact": 0.0, "graded": 7.5}
    assert (right.reward, right.solved) == (2.0, 1.0)
    assert (bad.reward, bad.error) == (0.0, "raised ValueError: reward nan is not finite")
    assert faults == ["prompt q: reward 'graded' raised ValueError: reward nan is not finite; it counts 0"]


def test_the_config_names_the_success_which_is_between_0_and_1(tmp_path: Path) -> None:
    config = several(tmp_path, {"kind": "exact"}, {"own": "graded", "weight": 0.0}, success="graded")
    faults: list[str] = []
    with ProcessRewardService(config, faults.append) as service:
        half, big = service.score([make_sample("half"), make_sample("big")])
    assert (half.reward, half.solved) == (0.0, 0.5)
    assert (big.solved, big.error) == (0.0, "gave 7.5, and a success is in [0, 1]")
    assert len(faults) == 1


def test_each_row_has_the_components_of_its_source(tmp_path: Path) -> None:
    config = several(
        tmp_path,
        {"kind": "math", "sources": ["maths"]},
        {"kind": "exact", "sources": ["text", "more"]},
        {"own": "graded"},
    )
    samples = [
        replace(sample, prompt=replace(sample.prompt, source=source))
        for sample, source in (
            (make_sample("so 5", "5"), "maths"),
            (make_sample("x", "x"), "text"),
            (make_sample("half"), ""),
        )
    ]
    with ProcessRewardService(config, pytest.fail) as service:
        maths, text, other = service.score(samples)
        service.check([sample.prompt for sample in samples])
    assert [score.solved for score in (maths, text, other)] == [1.0, 1.0, 0.5]
    assert [math.isnan(value) for value in maths.components.values()] == [False, True, False]
    assert [math.isnan(value) for value in other.components.values()] == [True, True, False]


def test_whole_groups_and_batches_beside_single_responses(tmp_path: Path) -> None:
    parts = {"kind": "exact"}, {"own": "groups"}, {"own": "batches", "settings": {"scope": "batch", "at_once": 4}}
    parts[1]["settings"] = {"scope": "group"}
    faults: list[str] = []
    samples = [
        make_sample(text, prompt_id=p) for p, text in zip("aaabbbb", ["right", "x", "x", *["raise"] * 4], strict=True)
    ]
    with ProcessRewardService(several(tmp_path, *parts, num_workers=2), faults.append) as service:
        scores = service.score(samples)
    assert [score.components["groups"] for score in scores] == [3, 4, 5, 0, 0, 0, 0]
    assert [score.components["batches"] for score in scores] == [4, 4, 4, 4, 3, 3, 3]
    assert [score.solved for score in scores] == [1, 0, 0, 0, 0, 0, 0]
    assert [fault.split(";")[0] for fault in faults] == ["prompt b: reward 'groups' raised ValueError: no"] * 4


def test_rows_that_nothing_could_judge_are_refused(tmp_path: Path) -> None:
    rows = [make_sample("", answer).prompt for answer in ("5", r"1,2,\ldots,9", r"5 \pmod{7}")]
    with ProcessRewardService(RewardConfig(kind="math"), pytest.fail) as service:
        service.check(rows[:1])
        with pytest.raises(DataError, match=r"reward 'math': cannot read .*ldots.*\(2 rows in all\)"):
            service.check(rows)
    only = several(tmp_path, {"kind": "exact", "sources": ["a"]})
    with (
        ProcessRewardService(only, pytest.fail) as service,
        pytest.raises(DataError, match="no component judges rows of data_source ''"),
    ):
        service.check(rows)
