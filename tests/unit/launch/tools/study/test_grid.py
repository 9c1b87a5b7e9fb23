from pathlib import Path

import pytest

from launch.cli import main
from launch.tools.study import arms
from launch.tools.study.grid import _values, write_grid
from qarl.errors import ConfigError

BASE = Path(__file__).parents[5] / "configs" / "quickstart.yaml"
ITEMS = ["learner.optimizer.lr=5e-5,1e-4", "task.levels=[2,3],[4]", "train.steps=4"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_sweep_is_a_study_of_every_combination() -> None:
    study = arms.load_study(write_grid(BASE, ITEMS, "mine", [0, 7]))
    assert list(study.arms) == [f"lr_{lr}-levels_{levels}" for lr in ("5e-5", "1e-4") for levels in ("2_3", "4")]
    runs = arms.plan(study)
    found = [(run.config.learner.optimizer.lr, run.config.task.levels, run.config.seed) for run in runs]  # type: ignore[union-attr]
    assert found == [(lr, levels, seed) for seed in (0, 7) for lr in (5e-5, 1e-4) for levels in ([2, 3], [4])]
    assert {run.config.train.steps for run in runs} == {4}
    assert runs[0].folder == Path("runs/studies/mine/mine-lr_5e-5-levels_2_3-seed0")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2", ["1", "2"]),
        ("[[1,2],[3,4]]", ["[[1,2],[3,4]]"]),
        ("[2, 3],[4]", ["[2, 3]", "[4]"]),
        ("[{name: a},{name: b}]", ["[{name: a},{name: b}]"]),
        ("""'a, b',"c",d""", ["'a, b'", '"c"', "d"]),
        ("""["x,'y"],don't,z""", ["""["x,'y"]""", "don't", "z"]),
    ],
)
def test_commas_within_quotes_lists_and_mappings_divide_nothing(text: str, values: list[str]) -> None:
    assert _values(text) == values


@pytest.mark.parametrize(
    ("items", "says"),
    [
        (["train.steps=4"], "no setting lists several values"),
        (["train.steps=4,4"], "two combinations have the same name"),
        (["train.steps=4,04"], "steps_4: another combination is the same run"),
        (["train.steps=4,x"], "arm steps_x: train.steps"),
        (["seed=1,2"], "seed=1: the study itself sets"),
        (["train.stepz=1,2"], "unknown key"),
    ],
)
def test_a_wrong_sweep_leaves_nothing(items: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        write_grid(BASE, items, "mine", [0])
    assert not Path("runs").exists()


def test_the_command_runs_and_reports_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran = list[str]()

    def train(run: arms.PlannedRun) -> None:
        ran.append(run.arm)
        run.folder.mkdir(parents=True)
        (run.folder / arms.FAILURE_FILE).write_text('[3, "not finite"]')

    monkeypatch.setattr(arms, "_train", train)
    argv = ["sweep", str(BASE), "learner.optimizer.lr=5e-5,1e-4", "model.build.sft.steps=7"]
    for _ in range(2):  # what has ended is not run again
        assert main(argv) == 0
    assert ran == ["lr_5e-5", "lr_1e-4"]
    file = "runs/studies/sweep-quickstart/sweep-quickstart"
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {file}.md"
    page = Path(f"{file}.md").read_text()
    assert f"Made by `qarl study {file}.yaml`" in page
    assert "| lr_5e-5 | `learner.optimizer.lr=5e-5` |" in page
