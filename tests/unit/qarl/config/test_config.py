"""The config tree is strict, documented, and its errors name the hint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qarl.config.io import documentation, load_config, to_yaml, validate
from qarl.config.run import Config
from qarl.config.task import DatasetTaskConfig
from qarl.errors import ConfigError

GYM = "task={kind: reasoning_gym, datasets: [{name: chain_sum}]}"
SHIPPED = sorted((Path(__file__).parents[4] / "configs").glob("*.yaml"))
BATCH_INVARIANT = "rollout.batch_invariant=true"
MINIMAL: dict[str, Any] = {"model": {"path": "models/x"}, "task": {"kind": "sorting"}}
TASK = {"kind": "dataset", "train_path": "t", "heldout_path": "h"}
MINIMAL_YAML = "model: {path: models/x}\ntask: {kind: sorting}\n"


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path / "c.yaml", MINIMAL_YAML)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def error_of(path: Path, overrides: Sequence[str] = ()) -> str:
    """The one line that loading `path` fails with, without the name of the file or the override."""
    line = whole_error_of(path, overrides).removeprefix(f"{path}: ")
    return re.sub(r"^override '.*?'?: (?=(unknown key '.*|[a-z0-9_.]+: ))", "", line)


def whole_error_of(path: Path, overrides: Sequence[str] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


def with_value(key: str, value: Any) -> dict[str, Any]:
    """The minimal tree with `value` at the dotted `key`."""
    tree = {name: dict(section) for name, section in MINIMAL.items()}
    *path, last = key.split(".")
    node: dict[str, Any] = tree
    for part in path:
        node = node.setdefault(part, {})
    node[last] = value
    return tree


# --- shipped configs and round trips ---------------------------------------------------------------------------------


def test_configs_are_shipped() -> None:
    assert {"quickstart", "gsm8k_qwen2.5_0.5b"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_config_loads_round_trips_and_introduces_itself(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert load_config(write(tmp_path / "again.yaml", to_yaml(config))) == config
    assert path.read_text().startswith("# ")  # `qarl config list` shows this line


SECTIONS = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(-(2**40), 2**40),
        "run": st.fixed_dictionaries({"name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]*", fullmatch=True)}),
        "learner": st.fixed_dictionaries({"optimizer": st.fixed_dictionaries({"lr": st.floats(1e-30, 1e30)})}),
        "pool": st.fixed_dictionaries(
            {"target": st.floats(0, 1), "strategy": st.sampled_from(["frontier", "uniform", "median"])}
        ),
        "mismatch": st.fixed_dictionaries({"stop_above": st.none() | st.floats(0, 1)}),
        "tracking": st.fixed_dictionaries({"progress": st.booleans()}),
    },
)


@settings(max_examples=40)  # each takes a tenth of a second
@given(SECTIONS)
def test_any_config_round_trips(tmp_path_factory: pytest.TempPathFactory, sections: dict[str, Any]) -> None:
    config = validate(MINIMAL | sections, "test")
    path = write(tmp_path_factory.getbasetemp() / "round_trip.yaml", to_yaml(config))
    assert load_config(path) == config


@settings(max_examples=40)
@given(st.text(st.sampled_from("\\${}?:#'\" a\n"), max_size=12))
def test_any_text_round_trips(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    config = validate(with_value("tracking.wandb_group", text), "test")
    path = write(tmp_path_factory.getbasetemp() / "text.yaml", to_yaml(config))
    assert load_config(path) == config


@pytest.mark.parametrize("key", ["run.dir", "model.path", "debug.train_from"])
def test_the_home_folder_in_every_path(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("HOME", "/my/home")
    found: Any = validate(with_value(key, "~/a"), "test")
    for part in key.split("."):
        found = getattr(found, part)
    assert found == "/my/home/a"


def test_files_of_a_task_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/my/home")
    for train in ("~/a", {"path": "~/a"}, ["~/a"], [{"path": "~/a"}]):
        for heldout in ("~/b", {"path": "~/b"}, {"heldout": "~/b"}, {"heldout": {"path": "~/b"}}):
            config = validate(MINIMAL | {"task": TASK | {"train_path": train, "heldout_path": heldout}}, "test")
            assert config.task == validate(MINIMAL | {"task": config.task.model_dump()}, "test").task
            assert isinstance(config.task, DatasetTaskConfig)
            assert [file.path for file in config.task.train_path] == ["/my/home/a"]
            assert {name: file.path for name, file in config.task.heldout_path.items()} == {"heldout": "/my/home/b"}


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"train_path": []}, "task.train_path: list should have at least 1 item"),
        ({"train_path": [{}]}, "task.train_path.0.path: required"),
        ({"train_path": ["a", {"path": "b", "wieght": 1}]}, "unknown key 'task.train_path.1.wieght', did you mean"),
        ({"train_path": [3]}, "task.train_path.0: "),
        ({"heldout_path": {}}, "task.heldout_path: dictionary should have at least 1 item"),
        ({"heldout_path": {"a b": "x"}}, "task.heldout_path.a b.[key]: "),
        ({"preset": "gsm9k"}, "task.preset: "),
        ({"chat": False, "system_prompt": "Hi"}, "task.chat: false has no use for system_prompt"),
    ],
)
def test_bad_task_keys(keys: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(MINIMAL | {"task": TASK | keys}, "test")
    assert line in str(caught.value)


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 256, "x/" * 2500])
def test_paths_that_no_file_system_takes(path: str) -> None:
    with pytest.raises(ConfigError, match=r"test: run\.dir: (must be|is longer)"):
        validate(with_value("run.dir", path), "test")


def test_a_config_cannot_be_changed() -> None:
    config = validate(MINIMAL, "test")
    with pytest.raises(ValidationError):
        config.train.steps = 3


# --- what is wrong, and where ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("trian", "train"),
        ("sead", "seed"),
        ("train.stepz", "train.steps"),
        ("task.levelz", "task.levels"),
        ("rollout.sampling.temprature", "rollout.sampling.temperature"),
        ("model.build.sft.step", "model.build.sft.steps"),
        ("qqqqqqqqqqqqqqqqqqqqqqqq", None),
    ],
)
def test_unknown_key_names_itself_and_the_nearest(key: str, nearest: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(with_value(key, {}), "test")
    hint = f"did you mean '{nearest}'?" if nearest else "`qarl config keys` lists the known ones"
    assert str(caught.value) == f"test: unknown key '{key}', {hint}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.steps", True),
        ("train.steps", "3"),
        ("train.steps", 3.0),
        ("train.steps", 0),
        ("seed", None),
        ("advantage.normalize_by_std", 1),
        ("advantage.normalize_by_std", "true"),
        ("pool.target", True),
        ("pool.target", 1.5),
        ("pool.target", "0.5"),
        ("learner.optimizer.lr", 0.0),
        ("learner.optimizer.lr", float("nan")),
        ("run.name", 3),
        ("rollout.scheme", None),
        ("rollout.scheme", "w8a8"),
        ("learner.zero_stage", 4),
        ("rollout.ignore", "lm_head"),
        ("task.levels", 3),
        ("train", 3),
        ("rollout.sampling", []),
        ("task.kind", "sort"),
    ],
)
def test_wrong_type_or_range_names_its_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(with_value(key, value), "test")
    assert key.removesuffix(".kind") in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("levels", [[], [0, 2], [-1], [3, 3], [4001]])
def test_impossible_levels(levels: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"task\.levels"):
        validate(with_value("task.levels", levels), "test")


def test_a_whole_number_is_a_float_too() -> None:
    assert validate(with_value("rollout.timeout_s", 60), "test").rollout.timeout_s == 60.0


def test_all_faults_are_listed_in_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        validate({"task": {"kind": "dataset", "levels": [2]}, "seed": "x"}, "test")
    line = str(caught.value)
    for fault in ("model: required", "task.train_path: required", "unknown key 'task.levels'", "seed: "):
        assert fault in line
    assert "\n" not in line


@pytest.mark.parametrize("missing", ["model", "task", "model.path", "task.kind"])
def test_required_keys(missing: str) -> None:
    tree = with_value(missing, None)
    section, _, key = missing.partition(".")
    del (tree[section] if key else tree)[key or section]
    with pytest.raises(ConfigError, match=f"test: {section}"):
        validate(tree, "test")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["train.group_size=1"], "train.group_size"),
        (["learner.minibatches=5", "train.prompts_per_step=4"], "learner.minibatches"),
        (["rollout.max_model_len=64", "rollout.sampling.max_new_tokens=64"], "rollout.sampling.max_new_tokens"),
        (["rollout.batch_invariant=true", "rollout.scheme=w4a16"], "rollout.batch_invariant"),
        (
            ["rollout.batch_invariant=true", "rollout.schedule=[{from_step: 2, scheme: w4a16}]"],
            "rollout.batch_invariant",
        ),
        (["rollout.tensor_parallel_size=2", "rollout.scheme=w4a16"], "rollout.tensor_parallel_size"),
        (
            ["rollout.tensor_parallel_size=2", "rollout.schedule=[{from_step: 2, scheme: fp8_block}]"],
            "rollout.tensor_parallel_size",
        ),
        (["rollout.tensor_parallel_size=2", "rollout.transport=nccl"], "rollout.tensor_parallel_size"),
        (["train.dynamic_sampling=1", "advantage.drop_zero_variance=false"], "train.dynamic_sampling"),
        (["objective.kind=grpo", "advantage.estimator=batch"], "advantage.drop_zero_variance"),
        (["objective.kind=reinforce_pp", "advantage.estimator=batch"], "objective.kind"),
        (["reward.kind=reasoning_gym"], "reward.kind"),
        ([GYM], "reward.kind"),
        (
            [GYM, "reward.kind=reasoning_gym", "pool.augment={per_step: 1, validator: {kind: vote}}"],
            "pool.augment.per_step",
        ),
        (["task={kind: reasoning_gym, datasets: [{name: a}], answer_pattern: '('}"], "task.answer_pattern"),
        (["model.build={}", f"model.fetch={{package: a, version: '1', sha256: {'a' * 64}}}"], "model.fetch"),
        (["pool.augment.template=Hello"], "pool.augment.template"),
        (["pool.augment.pattern='(a'"], "pool.augment.pattern"),
        (["pool.augment.pattern='(a)(b)'"], "pool.augment.pattern"),
        (["pool.augment.validator={kind: vote, answer_pattern: a}"], "pool.augment.validator.answer_pattern"),
        (
            ["pool.augment.validator={kind: teacher, base_url: 'http://u', model: m, prompt: Hello}"],
            "pool.augment.validator.prompt",
        ),
        (["pool.augment.validator={kind: teacher, base_url: 'u:1', model: m}"], "pool.augment.validator.base_url"),
        (["pool.augment.validator={kind: teacher, base_url: 'ftp://u', model: m}"], "pool.augment.validator.base_url"),
        (
            ["pool.augment.validator={kind: teacher, base_url: 'http://a b', model: m}"],
            "pool.augment.validator.base_url",
        ),
        (["pool.augment.validator={kind: teacher, base_url: 'http://ä', model: m}"], "pool.augment.validator.base_url"),
        (["pool.augment.validator={kind: teacher, base_url: 'http://u', model: ''}"], "pool.augment.validator.model"),
        (["pool.augment.validator={kind: vote, threshold: 0}"], "pool.augment.validator.threshold"),
        (["pool.augment.max_overlap=0"], "pool.augment.max_overlap"),
        (["pool.augment.max_heldout_overlap=0"], "pool.augment.max_heldout_overlap"),
        (["pool.priority_exponent=9.0"], "pool.priority_exponent"),
        (["pool.archive.capacity=3"], "pool.archive.capacity"),
        (["pool.archive.reinsert_per_step=3"], "pool.archive.reinsert_per_step"),
        (["pool.retire={solved_above: 0.3, hopeless_below: 0.3}"], "pool.retire.hopeless_below"),
        (["pool.retire={after_visits: 1, solved_above: 0.4}"], "pool.retire"),
        (["pool.target=0.1", "pool.retire={after_visits: 1, hopeless_below: 0.2}"], "pool.retire"),
        (["rollout.sampling.stop=['']"], "rollout.sampling.stop.0"),
        (["rollout.sampling.stop_token_ids=[-1]"], "rollout.sampling.stop_token_ids.0"),
        (["environment={kind: guess, max_turns: 5}"], "learner.max_tokens_per_micro_batch"),
        (
            ["environment={kind: guess, max_turns: 2}", "rollout.sampling.ignore_eos=true"],
            "rollout.sampling.ignore_eos",
        ),
        (["pool.augment.per_step=1", "rollout.sampling.ignore_eos=true"], "rollout.sampling.ignore_eos"),
        (["environment.kind=custom"], "environment.function"),
        (["environment.function='a:b'"], "environment.function"),
        (["environment.settings={a: 1}"], "environment.kind"),
        (["environment.kind=guess", "reward.components=[{kind: math}]"], "reward.components"),
        (["environment.kind=guess", "pool.augment.per_step=1"], "pool.augment.per_step"),
    ],
)
def test_contradictions_name_the_key(minimal: Path, overrides: list[str], key: str) -> None:
    assert error_of(minimal, overrides).startswith(f"{key}: ")


def test_settings_at_the_edge_of_a_contradiction_are_allowed(minimal: Path) -> None:
    config = load_config(minimal, ["train.group_size=2", "learner.minibatches=32"])
    assert (config.train.group_size, config.learner.minibatches) == (2, config.train.prompts_per_step)


# --- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("learner.optimizer.lr=1e-4", 1e-4),
        ("learner.optimizer.lr=0.5", 0.5),
        ("learner.optimizer.lr=2", 2.0),
        ("seed=7", 7),
        ("seed=-7", -7),
        ("tracking.progress=false", False),
        ("run.dir=a=b", "a=b"),
        ("run.name='3'", "3"),
        ("mismatch.stop_above=null", None),
        ("rollout.ignore=[lm_head, 're:.*gate']", ["lm_head", "re:.*gate"]),
        ("learner.optimizer.betas=[0.9, 0.95]", [0.9, 0.95]),
        ("model.build={}", validate(with_value("model.build", {}), "").model.build),
    ],
)
def test_overrides_are_typed_as_yaml(minimal: Path, override: str, value: Any) -> None:
    found: Any = load_config(minimal, [override])
    for part in override.partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_later_overrides_win_and_leave_the_rest(minimal: Path) -> None:
    config = load_config(minimal, ["train.steps=3", "train.steps=4"])
    assert config == validate(with_value("train.steps", 4), "test")


@pytest.mark.parametrize("override", ["train.steps", "=3", "=", "", "train.steps="])
def test_overrides_without_key_or_value(minimal: Path, override: str) -> None:
    assert error_of(minimal, [override]).startswith(f"override '{override}' is not key=value; ")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.steps=[1,", "not YAML"),
        ("run.name=${", "no viable"),
        ("run.name=#1", "a comment"),
        ("run.name=a\udc80", "bytes that are no text"),
        ("a\udc80=3", "bytes that are no text"),
        (f"train.steps={'9' * 5000}", "not YAML"),
        (f"seed={'[' * 2000}", "not YAML"),
        (f"{'a.' * 2000}a=1", "nested too deeply"),
        ("train..steps=3", "a part of its key is empty"),
    ],
)
def test_an_override_that_cannot_be_read_is_named(minimal: Path, override: str, reason: str) -> None:
    line = whole_error_of(minimal, ["seed=1", override, "train.steps=2"])
    assert line.startswith(f"override '{override[:77]}")
    assert reason in line
    assert len(line) < 400


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("tracking.trackers.0=wandb", "tracking.trackers: input should be a valid list, not {'0': 'wandb'}"),
        ("train=[1]", "train: a section of keys, not [1]"),
        ("run.name=007", "run.name: input should be a valid string, not 7; put it in quotes"),
        ("run.name=a/b", "run.name: a name has letters, digits, dots, dashes and underscores"),
        ("objective.kind=ppo", "objective.kind: must be one of 'tbpo', "),
        ("objective=tbpo", "objective: a section of keys, among them kind, not 'tbpo'"),
        ("learner.optimizer.betas=[1.0, 0.9]", "learner.optimizer.betas.0: input should be less than 1"),
        ("rollout.sampling.temperature=0.001", "rollout.sampling.temperature: input should be greater than or equal"),
        ("rollout.sampling.top_p=0.9", "rollout.sampling.top_p: training samples from the whole distribution"),
        ("rollout.sampling.min_p=0.1", "rollout.sampling.min_p: training samples from the whole distribution"),
        ("rollout.num_cpus_per_worker=1.5", "rollout.num_cpus_per_worker: more than one CPU can be reserved in whole"),
        ("learner.zero_stage=0", "learner.zero_stage: DeepSpeed refuses stage 0"),
        ("debug.profile_steps=[101, 102]", "debug.profile_steps: [101, 102] begins after train.steps 100"),
        ("rollout.max_num_seqs=5000", "rollout.max_num_seqs: 5000 sequences need a token each"),
        ("train.steps=10000000000", "train.steps: input should be less than or equal to 2147483647"),
    ],
)
def test_a_wrong_value_is_explained(minimal: Path, override: str, line: str) -> None:
    assert error_of(minimal, [override]).startswith(line)


@pytest.mark.parametrize(("short", "full"), [("bf16", "bfloat16"), ("fp32", "float32"), ("float", "float32")])
def test_short_names_of_dtypes(minimal: Path, short: str, full: str) -> None:
    assert load_config(minimal, [f"model.dtype={short}"]).model.dtype == full


@pytest.mark.parametrize("override", ["train.stepz=3", "train.steps.x=3", "train..steps=3", "train=3"])
def test_overrides_are_as_strict_as_the_file(minimal: Path, override: str) -> None:
    assert "train" in error_of(minimal, [override])


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"- a\n- b\n", "a config file holds `key: value` lines"),
        (b"3\n", "a config file holds `key: value` lines"),
        (b"train: {steps: [\n", "not YAML"),
        (b"a: b: c\n", "not YAML"),
        (b"seed: 1\nseed: 2\n", "not YAML"),
        (b"\xff\xfe\x00\x80", "not YAML"),
        (b"run: !!python/object:os.x {}\n", "not YAML"),
        (b"", "model: required; task: required"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    assert error_of(path).startswith(reason)


@pytest.mark.parametrize("name", ["nothing.yaml", "."])
def test_missing_file(tmp_path: Path, name: str) -> None:
    assert error_of(tmp_path / name).startswith("no such config file; ")


def test_inheritance_merges_deeply_and_relative_to_the_file(tmp_path: Path, minimal: Path) -> None:
    write(tmp_path / "base.yaml", MINIMAL_YAML + "seed: 1\ntrain: {steps: 5, group_size: 4}\nrollout: {ignore: [a]}\n")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub/middle.yaml", "inherits: ../base.yaml\ntrain: {steps: 6}\nrollout: {ignore: [b, c]}\n")
    top = write(tmp_path / "sub/top.yaml", "inherits: middle.yaml\nseed: 2\n")
    config = load_config(top, ["train.prompts_per_step=9"])
    assert (config.seed, config.train.steps, config.train.group_size, config.train.prompts_per_step) == (2, 6, 4, 9)
    assert config.rollout.ignore == ["b", "c"]  # a list is one value


def test_inheritance_cycle_names_the_files(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "inherits: b.yaml\n")
    write(tmp_path / "b.yaml", "inherits: a.yaml\n")
    line = error_of(tmp_path / "a.yaml")
    assert "inherits itself" in line
    assert all(name in line for name in ("a.yaml", "b.yaml"))


def test_inherited_file_that_is_missing_is_named(tmp_path: Path) -> None:
    assert "gone.yaml: no such config file" in error_of(write(tmp_path / "a.yaml", "inherits: gone.yaml\n"))


@pytest.mark.parametrize(
    ("section", "fault"),
    [
        ({"seed": "x"}, "seed: "),
        ({"sead": 1}, "unknown key 'sead'"),
        ({"train": {"stepz": 1}}, "unknown key 'train.stepz'"),
        ({"objective": {"kind": "ppo"}}, "objective.kind: "),
    ],
)
def test_a_fault_names_the_file_that_has_it(tmp_path: Path, section: dict[str, Any], fault: str) -> None:
    write(tmp_path / "base.yaml", yaml.safe_dump(MINIMAL | section))
    line = error_of(write(tmp_path / "c.yaml", "inherits: base.yaml\ntracking: {progress: 3}\n"))
    of_base, of_child = sorted(line.split("; "), key=lambda part: "progress" in part)
    assert of_base.startswith(fault)
    assert of_base.endswith(f"(in {tmp_path}/base.yaml)")
    assert of_child.endswith("not 3")


@pytest.mark.parametrize(
    "override",
    [
        "train.stepz=3",  # no key
        "train.steps=many",  # a type
        "seed=x",
        "train=3",  # a section
        "train.group_size=1",  # a value that never works
        "learner.minibatches=33",  # against a key of the file
        "train.prompts_per_step=2",  # the message begins with another key, learner.minibatches
        "objective.kind=ppo",
        "objective.kind=custom",  # the new kind requires a key that nobody has set
        "train.steps=${nothing}",
    ],
)
def test_a_fault_names_the_override_that_has_it(minimal: Path, override: str) -> None:
    write(minimal, yaml.safe_dump(MINIMAL | {"learner": {"minibatches": 4}, "train": {"prompts_per_step": 8}}))
    assert whole_error_of(minimal, ["tracking.progress=true", override]).startswith(f"override '{override}': ")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learner.lr", "learner.optimizer.lr' or 'model.build.sft.lr"),
        ("gpus", ""),
        ("TRAIN.STEPS", "train"),  # the first unknown part is told
        ("rollout.temperature", "rollout.sampling.temperature"),
        ("train.stepz", "train.steps"),
        ("train.Steps", "train.steps"),
        ("lerner", "learner"),
    ],
)
def test_the_nearest_key_is_proposed(minimal: Path, key: str, nearest: str) -> None:
    line = error_of(minimal, [f"{key}=1"])
    assert line.endswith(f"did you mean '{nearest}'?" if nearest else "`qarl config keys` lists the known ones")


def test_faults_of_several_overrides_and_of_the_file(minimal: Path) -> None:
    line = whole_error_of(minimal, ["seed=x", "train.stepz=3"])
    assert line.startswith("seed: ")
    assert re.findall(r"\(in override '(.*?)'\)", line) == ["seed=x", "train.stepz=3"]
    write(minimal, yaml.safe_dump(MINIMAL | {"train": {"steps": "many"}}))
    of_override, of_file = sorted(whole_error_of(minimal, ["seed=x"]).split("; "), key=lambda part: "many" in part)
    assert "override 'seed=x'" in of_override
    assert "override" not in of_file


@pytest.mark.parametrize("name", ["[a.yaml]", "3", "''", "${seed}.yaml", "???"])
def test_inherits_names_one_file(tmp_path: Path, name: str) -> None:
    assert error_of(write(tmp_path / "c.yaml", f"inherits: {name}\n")).startswith(
        "inherits: the name of one file, not "
    )


def test_interpolation_follows_overrides(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "model: {path: 'm/s${seed}'}\ntask: {kind: sorting}\nseed: 1\n")
    assert load_config(path).model.path == "m/s1"
    assert load_config(path, ["seed=5"]).model.path == "m/s5"


@pytest.mark.parametrize("value", ["${nothing}", "${oc.env:NO_SUCH_VARIABLE_HERE}"])
def test_interpolation_of_nothing(minimal: Path, value: str) -> None:
    assert value.strip("${}").rpartition(":")[2] in error_of(minimal, [f"run.name={value}"])


# --- documentation ---------------------------------------------------------------------------------------------------


def test_every_key_is_documented_once() -> None:
    rows = list(documentation())
    keys = [key for key, _, _ in rows]
    assert len(set(keys)) == len(keys)
    assert [key for key, _, description in rows if not description.endswith(".")] == []


def test_documentation_covers_the_tree_and_its_defaults() -> None:
    documented = {key: default for key, default, _ in documentation()}

    def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in tree.items():
            flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return flat

    config = validate(with_value("model.build", {}), "test")
    for key, value in leaves(config.model_dump()).items():
        as_yaml = str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
        assert documented[key] == ("required" if key == "model.path" else as_yaml), key
    assert {f"task.{name}" for name in DatasetTaskConfig.model_fields} <= documented.keys()
    assert Config.model_fields.keys() <= documented.keys()


def test_partial_responses_leave_places_to_the_check_of_a_publication() -> None:
    partial = {"train": {"max_staleness": 1}, "rollout": {"max_num_seqs": 16, "partial": True}}
    assert validate(MINIMAL | partial, "test").rollout.responses_at_once == 12
    assert validate(MINIMAL | {"rollout": {"max_num_seqs": 16}}, "test").rollout.responses_at_once == 16
