"""The figures of an evaluation from its samples, and the table of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from launch.tools.evaluation.statistics import Estimate, Floats, compare, estimate, majority_at_k, pass_at_k

Rows = Sequence[Mapping[str, Any]]
Reader = Callable[[str], str]
"""The answer in a response, as a text; empty for none."""


def results(rows: Rows, schemes: Sequence[str], num_samples: int, read: Reader | None) -> dict[str, Any]:
    """Figures of each scheme with their 95% intervals, and each scheme against the first on the same prompts.

    `pass@1` is the share of right samples, `pass@k` the unbiased estimate for k = 2, 4, 8, ... and `num_samples`. A
    sample is right when its success is 1, as in training. By level and held-out set where there are several. `maj@k`
    is the share that a vote of k samples gets right, where `read` says which answer a response gives.
    """
    by_scheme = {scheme: _by_prompt([row for row in rows if row["scheme"] == scheme]) for scheme in schemes}
    found: dict[str, Any] = {
        "schemes": {scheme: _figures(prompts, num_samples, read) for scheme, prompts in by_scheme.items()}
    }
    first, *others = schemes
    base = by_scheme[first]
    found["paired"] = {
        scheme: {"against": first, **compare(_right(base), _right({p: by_scheme[scheme][p] for p in base}))._asdict()}
        for scheme in others
    }
    return found


def _figures(prompts: Mapping[str, Rows], num_samples: int, read: Reader | None) -> dict[str, Any]:
    samples = [row for rows in prompts.values() for row in rows]
    ks = [k for k in sorted({2**i for i in range(1, 12)} | {num_samples}) if 1 < k <= num_samples]
    right = {prompt: sum(row["success"] >= 1 for row in rows) for prompt, rows in prompts.items()}
    found = {"pass@1": estimate(_right(prompts))._asdict()}
    for k in ks:
        found[f"pass@{k}"] = estimate(np.array([pass_at_k(num_samples, c, k) for c in right.values()]))._asdict()
    if read is not None:
        votes = [([read(r["response"]) for r in rows], [r["success"] >= 1 for r in rows]) for rows in prompts.values()]
        for k in ks:
            found[f"maj@{k}"] = estimate(np.array([majority_at_k(*vote, k) for vote in votes]))._asdict()
    for key, label in (("level", "level_{:02d}/pass@1"), ("set", "{}/pass@1")):
        values = sorted({row[key] for row in samples})
        for value in values if len(values) > 1 else ():
            part = {prompt: rows for prompt, rows in prompts.items() if rows[0][key] == value}
            found[label.format(value)] = estimate(_right(part))._asdict()
    return {
        **found,
        "mean_reward": float(np.mean([row["reward"] for row in samples])),
        "response_length/mean": float(np.mean([row["tokens"] for row in samples])),
        "response_length/clip_ratio": float(np.mean([row["finish_reason"] == "length" for row in samples])),
        "prompts": len(prompts),
    }


def _by_prompt(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["prompt"], []).append(row)
    return found


def _right(prompts: Mapping[str, Rows]) -> Floats:
    """The share of right samples of each prompt: [P]."""
    return np.array([np.mean([row["success"] >= 1 for row in rows]) for rows in prompts.values()])


def table(found: Mapping[str, Any]) -> Table:
    """Every figure that has an interval, a column for each scheme, and the differences."""
    schemes = found["schemes"]
    out = Table("", *schemes, box=SIMPLE_HEAD, show_edge=False)
    for name, value in next(iter(schemes.values())).items():
        if isinstance(value, dict):
            out.add_row(name, *(_interval(Estimate(**scheme[name])) for scheme in schemes.values()))
    for name in ("response_length/mean", "response_length/clip_ratio"):
        out.add_row(name, *(f"{scheme[name]:.3g}" for scheme in schemes.values()))
    for scheme, pair in found["paired"].items():
        difference = f"{pair['value']:+.3f} ({pair['low']:+.3f} to {pair['high']:+.3f}), p {pair['p']:.2g}"
        out.caption = f"{out.caption or ''}{scheme} against {pair['against']}, pass@1: {difference}\n"
    return out


def _interval(value: Estimate) -> str:
    return f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f})"
