"""The outcome of a run, gathered from its parts and its log."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from launch.run.report import CURVES_FILE, REPORT_FILE, Summary
from launch.run.tracking import METRICS_FILE, read_log
from qarl.config.run import Config
from qarl.config.schedule import schemes_of
from qarl.types import WorkerInfo
from trainer.loop import Progress


def make_summary(
    config: Config,
    run_dir: Path,
    infos: Sequence[WorkerInfo],
    progress: Progress,
    after: dict[str, float],
    controls: dict[str, float],
    files: Mapping[str, str],
) -> Summary:
    """The summary of a finished run: `after` is its last evaluation, `files` what it exported."""
    rows = read_log(run_dir / METRICS_FILE)
    return Summary(
        run=config.run.name,
        scheme=" then ".join(scheme.label for scheme in schemes_of(config.rollout)),
        kernels=sorted({kernel for info in infos for kernel in info.kernels}),
        steps=progress.step,
        rollouts=progress.rollouts,
        train_seconds=progress.train_seconds,
        tokens_per_s=progress.tokens / progress.train_seconds,
        eval_before=progress.eval_before,
        eval_after=after,
        controls=controls,
        mismatch_aligned=_mismatch(rows, "mismatch/"),
        mismatch_unaligned=_mismatch(rows, "mismatch/unaligned_"),
        files={**files, "report": str(run_dir / REPORT_FILE), "curves": str(run_dir / CURVES_FILE)},
    )


def _mismatch(rows: Sequence[dict[str, Any]], prefix: str) -> dict[str, float]:
    """Over all logged steps: mean of the means, largest maximum, mean k3."""
    found = [row for row in rows if f"{prefix}logp_abs_mean" in row]
    if not found:
        return {}
    return {
        "mean": fmean(float(row[f"{prefix}logp_abs_mean"]) for row in found),
        "max": max(float(row[f"{prefix}logp_abs_max"]) for row in found),
        "k3": fmean(float(row[f"{prefix}k3_kl"]) for row in found),
    }
