"""A run's metrics, tables, alerts and models in Weights & Biases."""

import math
import os
import secrets
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launch.run.files import write_whole
from launch.run.metric_table import describe
from launch.run.resume import CONFIG_FILE, function_files
from qarl.config.run import TRACKERS, Config
from qarl.errors import INTERRUPTED, ResourceError
from qarl.hooks import source_file
from qarl.metrics import Histogram, Value
from qarl.protocols import Row, Tracker

WANDB_ID_FILE = "wandb_id"
LOGIN = "run `wandb login`, or set tracking.wandb_mode=offline"
WRONG_KEY = "correct or unset that key, or set tracking.wandb_mode=offline"
WRONG_SETTING = "correct or unset the WANDB_... variable, or the line in ~/.config/wandb/settings"
PACKAGES = ("qarl", "rollout", "trainer", "rewards", "launch")


class WandbTracker(Tracker):
    """Weights & Biases; `tracking.wandb_mode` says how. Raises ResourceError when it cannot start the run.

    Args:
        logged: rows of the metrics from before an interrupt. W&B has all but perhaps the last one. When a resumed run
            makes them again, only that one is sent.
    """

    def __init__(self, config: Config, run_dir: Path, start_step: int, logged: Sequence[Mapping[str, Any]]) -> None:
        self._config = config
        self._run = _start(config, run_dir, start_step)
        self._sent = {(row["step"], frozenset(row) - {"step", "time"}) for row in logged[:-1]}
        self._last = max((row["step"] for row in logged), default=0)
        self._defined = set[str]()
        self._tables = dict[str, Any]()
        self._failed = False
        _log_code(self._run, config, run_dir)

    def log(self, step: int, metrics: Mapping[str, Value]) -> None:
        import wandb

        if (step, frozenset(metrics)) in self._sent:
            return
        for name in metrics.keys() - self._defined:
            self._define(name)
        drawn = {
            name: wandb.Histogram(np_histogram=(list(value.counts), list(value.edges)))
            if isinstance(value, Histogram)
            else float(value)
            for name, value in metrics.items()
        }
        self._run.log({"step": step, **drawn})

    def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        """Add the rows to the one table `name`, with None for NaN, which W&B would write as no JSON. What has a value
        for each token stays in the run's own file."""
        import wandb

        shown = [{"step": step, **{k: v for k, v in row.items() if isinstance(v, float | int | str)}} for row in rows]
        if not shown or step < self._last:
            return
        if name not in self._tables:
            self._tables[name] = wandb.Table(columns=list(shown[0]), log_mode="INCREMENTAL", allow_mixed_types=True)
        table = self._tables[name]
        for row in shown:
            cells = map(row.get, table.columns)
            table.add_data(*(None if isinstance(cell, float) and math.isnan(cell) else cell for cell in cells))
        self._run.log({"step": step, name: table})

    def alert(self, title: str, text: str) -> None:
        self._run.alert(title, text, level="WARN")

    def exported(self, files: Mapping[str, Path]) -> None:
        """Record each model folder as an artifact that this run made from the model that it started with."""
        import wandb

        base = Path(self._config.model.path).absolute()
        if self._config.tracking.wandb_mode == "online":  # W&B records what a run uses only while it can be reached
            used = wandb.Artifact(_artifact_name(base.name), "model")
            used.add_reference(base.as_uri(), checksum=False)
            self._run.use_artifact(used)
        for name, folder in files.items():
            about = {"format": name, "base_model": str(base), "run": self._config.run.name}
            artifact = wandb.Artifact(_artifact_name(f"{self._config.run.name}-{folder.name}"), "model", metadata=about)
            if self._config.tracking.upload_models:
                artifact.add_dir(str(folder), skip_cache=True, policy="immutable")
            else:
                artifact.add_reference(folder.absolute().as_uri(), checksum=False)
            self._run.log_artifact(artifact, aliases=[name.replace(" ", "-")])

    def stopped(self, reason: str) -> None:
        self._failed = True
        self._run.alert("run stopped", reason, level="INFO" if reason == INTERRUPTED else "ERROR")

    def close(self) -> None:
        self._run.finish(exit_code=int(self._failed))

    def _define(self, name: str) -> None:
        """Have W&B's summary keep the last value of the metric and, where one value is the best, that one."""
        row = describe(name)
        summary = f"last,{row.best}" if row and row.best else "last"
        self._run.define_metric(name, step_metric="step", summary=summary)
        self._defined.add(name)


def check_login(config: Config) -> None:
    """Raises ResourceError: W&B refuses its settings; or the run logs to it online, and this machine has no key for it,
    or one of a wrong form."""
    if "wandb" not in config.tracking.trackers or config.tracking.wandb_mode == "disabled":
        return
    if config.tracking.wandb_mode == "offline":
        _check_settings()
    elif not has_wandb_key():
        raise ResourceError("W&B has no key on this machine", "tracking.wandb_mode", LOGIN)


def has_wandb_key() -> bool:
    """Whether this machine has a key for W&B, which is not asked whether it is valid. Raises ResourceError: its form is
    wrong, or another setting of W&B."""
    import wandb

    _check_settings()
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.errors.AuthenticationError as error:
        what = f"W&B cannot use its key: {' '.join(str(error).split()).rstrip('.')}"
        raise ResourceError(what, "tracking.wandb_mode", WRONG_KEY) from error


def _check_settings() -> None:
    """Raises ResourceError: W&B refuses a variable of the environment, or a line of its own file."""
    import wandb

    settings = wandb.Settings()
    try:
        settings.update_from_system_settings()
        settings.update_from_env_vars(dict(os.environ))
    except (ValidationError, wandb.Error) as error:
        found = [str(error)]
        if isinstance(error, ValidationError):
            found = [f"{'.'.join(map(str, one['loc']))} is {one['input']!r}: {one['msg']}" for one in error.errors()]
        raise ResourceError(f"W&B refuses its settings: {'; '.join(found)}", hint=WRONG_SETTING) from error


def _start(config: Config, run_dir: Path, start_step: int) -> Any:
    """A W&B run in `run_dir`, under the id that the run had before when it is resumed."""
    import wandb

    id_file = run_dir / WANDB_ID_FILE
    if start_step == 0 or not id_file.is_file():
        write_whole(id_file, os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))  # the agent of a sweep sets it
    try:
        run = wandb.init(
            project=config.tracking.wandb_project,
            group=config.tracking.wandb_group,
            name=config.run.name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=run_dir,
            mode=config.tracking.wandb_mode,
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, quiet=True, console="off"),
        )
    except wandb.Error as error:
        raise ResourceError(f"W&B did not start: {' '.join(str(error).split())}", hint=LOGIN) from error
    # We number the steps: a resumed run logs some of them again, and W&B's own counter only grows.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _log_code(run: Any, config: Config, run_dir: Path) -> None:
    """Save the run's config, and the code that runs, as an artifact: qarl's, and the files of the user's functions."""
    import wandb

    code = wandb.Artifact(_artifact_name(f"code-{run.id}"), "code")
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec
        for folder in map(Path, spec.submodule_search_locations or ()):
            for file in sorted(folder.rglob("*.py")):
                code.add_file(str(file), f"{package}/{file.relative_to(folder)}", skip_cache=True)
    own = (source_file(name) for name in config.tracking.trackers if name not in TRACKERS)
    for file in sorted({file.resolve() for file in (*function_files(config).values(), *own) if file}):
        code.add_file(str(file), f"functions/{file.relative_to(file.anchor)}", skip_cache=True)
    if (run_dir / CONFIG_FILE).is_file():
        code.add_file(str(run_dir / CONFIG_FILE), CONFIG_FILE, skip_cache=True)
    run.log_artifact(code)


def _artifact_name(text: str) -> str:
    """`text` with the characters that the name of an artifact may have."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in text)[:120]
