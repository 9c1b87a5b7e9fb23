"""What the report draws: for each panel, which metrics, and how."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qarl.prompts.augment import REASONS
from qarl.prompts.stats import BINS

PHASES = (
    "pool",
    "sample",
    "reward",
    "sleep",
    "prox",
    "unaligned",
    "error_tokens",
    "update",
    "publish",
    "augment",
    "table",
)
"""Of a step: every one that trainer/loop.py and trainer/collect.py time."""
STATES = ("cold", "low", "high", "in_flight", "cooling", "retired")


@dataclass(frozen=True)
class Panel:
    """One chart for the metrics `lines`: their names in a run, each with the label that a reader sees.

    `line` draws all runs into one chart, `area` and `bar` stack the metrics and draw each run alone. `scale` is
    `log` for values whose zeros count. `ordered` metrics get colours from dark to light.
    """

    title: str
    text: str
    unit: str
    lines: Mapping[str, str]
    kind: Literal["line", "area", "bar"] = "line"
    scale: Literal["linear", "share", "log"] = "linear"
    ordered: bool = False


def _named(prefix: str, names: Sequence[str]) -> dict[str, str]:
    return {f"{prefix}{name}": name.replace("_", " ") for name in names}


PANELS = (
    Panel(
        "Reward",
        "Mean over the responses of a step, and the share of them that are right.",
        "",
        {"reward/mean": "reward", "reward/accuracy": "accuracy"},
    ),
    Panel(
        "Held-out accuracy",
        "With 95% intervals over the held-out prompts. Dotted: controls without RL.",
        "share",
        {"eval/pass@1": "pass@1", "eval/greedy": "greedy"},
        scale="share",
    ),
    Panel(
        "Learner against sampler",
        "|d log p| of the sampled tokens. 0 means that both compute the same, bit for bit.",
        "nats",
        {
            "mismatch/logp_abs_max": "aligned, max",
            "mismatch/logp_abs_mean": "aligned, mean",
            "mismatch/probe_logp_abs_max": "probe, max",
            "mismatch/unaligned_logp_abs_max": "unaligned, max",
            "mismatch/unaligned_logp_abs_mean": "unaligned, mean",
        },
        scale="log",
    ),
    Panel(
        "Mismatch by position",
        "Mean |d log p| in each quarter of the responses.",
        "nats",
        {f"mismatch/q{q}_logp_abs_mean": f"quarter {q}" for q in range(1, 5)},
        scale="log",
    ),
    Panel("Codes changed", "Low-bit codes that an update changed.", "share", {"quant/codes_changed": "codes changed"}),
    Panel(
        "Updates below the grid",
        "Weights that an update moved by less than half a grid step.",
        "share",
        {"quant/update_below_grid": "update below the grid"},
    ),
    Panel(
        "Clipped, by branch",
        "Share clipped of those with a positive or a negative advantage, above or below the bound.",
        "share",
        {
            "actor/clip_fraction": "all",
            "actor/clip_fraction_pos_high": "positive, high",
            "actor/clip_fraction_neg_low": "negative, low",
            "actor/clip_fraction_neg_high": "negative, high",
            "actor/clip_fraction_high": "high",
            "actor/clip_fraction_low": "low",
            "actor/tokens_dropped": "tokens dropped",
        },
    ),
    Panel("Prompt pool", "Prompts by state.", "prompts", _named("pool/", STATES), "area"),
    Panel(
        "Success rates in the pool",
        "Share of the drawn prompts, by their success rate.",
        "share",
        {f"pool/success_hist_{k}": f"{k / BINS:.1f} to {(k + 1) / BINS:.1f}" for k in range(BINS)},
        "area",
        "share",
        ordered=True,
    ),
    Panel("Phases", "Seconds of each phase of a step.", "s", _named("timing_s/", (*PHASES, "other")), "bar"),
    Panel(
        "Idle",
        "Share of a step in which a worker has no group, and the learner no call.",
        "share",
        {"perf/workers_idle": "workers", "perf/learner_idle": "learner"},
        scale="share",
    ),
    Panel(
        "Speed",
        "Sampled tokens for each second: of a whole step, and of its sampling alone.",
        "tokens/s",
        {"perf/tokens_per_s": "step", "perf/sample_tokens_per_s": "sampling"},
    ),
    Panel(
        "Memory",
        "Resident memory of a run's processes on the driver's machine.",
        "GiB",
        _named("memory/", ("driver", "workers", "ranks", "others", "gpu_peak")),
        "area",
    ),
    Panel(
        "Error tokens",
        "Tokens that each detector flags.",
        "share",
        _named("error_tokens/", ("share", "repeated", "compressible", "improbable")),
    ),
    Panel(
        "Response length",
        "Tokens of a response.",
        "tokens",
        _named("response_length/", ("mean", "max")),
    ),
    Panel(
        "Policy",
        "Entropy, and how far an update moves the policy (KL to pi_prox).",
        "nats",
        {"actor/entropy": "entropy", "actor/ppo_kl": "KL to pi_prox", "actor/kl_loss": "KL to reference"},
    ),
    Panel("Gradient norm", "Over the minibatches of a step.", "", _named("actor/", ("grad_norm", "grad_norm_max"))),
    Panel("Staleness", "How old the samples are.", "", {}),
    Panel(
        "Problems made by the policy",
        "Since the start, by their fate.",
        "problems",
        _named("augment/", ("accepted", *(f"rejected_{reason}" for reason in REASONS))),
        "area",
    ),
)


def with_rest(series: Mapping[str, Mapping[int, float]]) -> dict[str, Mapping[int, float]]:
    """The series, and as `timing_s/other` what no phase took of a step."""
    phases = [series.get(f"timing_s/{name}", {}) for name in PHASES]
    steps = series.get("timing_s/step", {})
    rest = {step: max(0.0, whole - sum(points.get(step, 0.0) for points in phases)) for step, whole in steps.items()}
    return {**series, **({"timing_s/other": rest} if rest else {})}


def drawn(panels: Sequence[Panel], names: set[str]) -> list[dict[str, Any]]:
    """The panels that have something to draw, as the page reads them, with those lines that a run has."""
    found = []
    for panel in panels:
        lines = {name: label for name, label in panel.lines.items() if name in names}
        if panel.title == "Staleness":
            lines = {name: name.partition("/")[2] for name in sorted(names) if name.startswith("staleness/")}
        if lines:
            found.append({**vars(panel), "lines": lines})
    return found
