"""The one table of metrics: what each means, its unit, and in which section a reader finds it.

Dashboard, report and docs/metrics.md follow it. `python -m launch.run.metric_table` prints that page.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Literal

Best = Literal["max", "min", ""]
Row = tuple[str, str, Best, str]
"""Name, unit, which value is the best one ("" where none is), description. `*` in a name stands for any text."""
OTHER = "other"
"""The section of metrics that the table does not have, such as those of your own objective."""
HELD_OUT = "eval/num_prompts"
"""The one metric of an evaluation that is a count, and no figure of the policy."""

SECTIONS: dict[str, tuple[Row, ...]] = {
    "reward": (
        ("reward/mean", "", "max", "mean reward of the responses of a step"),
        ("reward/std", "", "", "standard deviation of these rewards"),
        ("reward/accuracy", "share", "max", "responses that are right: their success is 1"),
        ("reward/faults", "count", "min", "responses whose verifier failed; they count 0"),
        ("reward/informative_groups", "share", "", "groups whose rewards differ, so that they can be learned from"),
        ("reward/*/mean", "", "", "mean of one component of the reward"),
        ("reward/*/std", "", "", "standard deviation of one component of the reward"),
        ("response_length/mean", "tokens", "", "mean length of the responses"),
        ("response_length/max", "tokens", "", "longest response"),
        ("response_length/clip_ratio", "share", "min", "responses that the token limit cut"),
        ("response_length/*_mean", "tokens", "", "mean length of the responses that the update kept or dropped"),
        ("response_length/*_max", "tokens", "", "longest response that the update kept or dropped"),
    ),
    "eval": (
        ("eval/pass@1", "share", "max", "right samples of the held-out prompts at temperature 1"),
        ("eval/pass@*", "share", "max", "held-out prompts with a right sample among k"),
        ("eval/greedy", "share", "max", "right samples of the held-out prompts at temperature 0"),
        ("eval/mean_reward", "", "max", "mean reward of the samples of the held-out prompts"),
        ("eval/*/pass@1", "share", "max", "right samples of one level, or of one held-out set"),
        (HELD_OUT, "count", "", "held-out prompts of the evaluation"),
    ),
    "objective": (
        ("actor/loss", "", "", "the loss, averaged over the step's minibatches"),
        ("actor/groups_used", "count", "", "groups that the update learned from"),
        ("actor/clip_fraction", "share", "", "sequences (CISPO: tokens) that the objective clips"),
        ("actor/clip_fraction_pos_high", "share", "", "of positive advantage, those whose ratio is above its bound"),
        ("actor/clip_fraction_neg_low", "share", "", "of negative advantage, those whose ratio is below its bound"),
        ("actor/clip_fraction_neg_high", "share", "", "of negative advantage, those whose ratio is above its bound"),
        ("actor/clip_fraction_high", "share", "", "tokens whose ratio is above its bound (CISPO)"),
        ("actor/clip_fraction_low", "share", "", "tokens whose ratio is below its bound (CISPO)"),
        ("actor/clip_fraction_last_minibatch", "share", "", "clipped in the last minibatch of a step"),
        ("actor/tokens_dropped", "share", "", "tokens without gradient although their advantage is not 0"),
        ("actor/sequences_dropped", "share", "", "sequences that have only such tokens"),
        ("actor/ppo_kl", "nats", "", "mean of log pi_prox - log pi_theta during the update"),
        ("actor/seq_ratio_mean", "", "", "mean sequence ratio of pi_theta to pi_prox"),
        ("actor/seq_ratio_max_dev", "", "", "largest |r_seq - 1|"),
        ("actor/seq_ratio_max_dev_first_minibatch", "", "", "the same before the first optimizer step: 0 when exact"),
        ("actor/seq_ratio_eff_sample_size", "share", "", "effective sample size of the sequence ratios"),
        ("actor/seq_mismatch_weight_mean", "", "", "mean of the weights that correct the mismatch, by sequence"),
        ("actor/seq_mismatch_weight_hist", "histogram", "", "sequences by these weights"),
        ("actor/seq_mismatch_weight_*", "share", "", "weights that were capped or masked; effective sample size"),
        ("actor/token_mismatch_weight_*", "share", "", "tokens whose mismatch weight was capped or masked"),
        ("actor/entropy", "nats", "", "entropy of the policy, mean over tokens"),
        ("actor/kl_loss", "nats", "", "KL to the reference model"),
        ("actor/lr", "", "", "learning rate"),
        ("actor/grad_norm", "", "", "gradient norm, mean over minibatches"),
        ("actor/grad_norm_max", "", "", "largest gradient norm of a minibatch"),
    ),
    "mismatch": (
        ("mismatch/logp_abs_mean", "nats", "", "mean |d log p| between learner and sampler"),
        ("mismatch/logp_abs_p99", "nats", "", "99th percentile of |d log p|"),
        ("mismatch/logp_abs_max", "nats", "min", "largest |d log p| of a step: 0 when exact"),
        ("mismatch/k1_kl", "nats", "", "KL(sampler || learner), estimator k1"),
        ("mismatch/k3_kl", "nats", "", "KL(sampler || learner), estimator k3"),
        ("mismatch/seq_ratio_*", "", "", "sequence ratios of learner to sampler"),
        ("mismatch/ess", "share", "", "effective sample size of the weights learner / sampler"),
        ("mismatch/logp_abs_above_*", "share", "", "tokens whose |d log p| is above the bound in the name"),
        ("mismatch/q[1-4]_*", "", "", "the same statistics of the first to the last quarter of each response"),
        (
            "mismatch/stale_compared",
            "count",
            "",
            "parts of responses that were compared with the learner of the older version that sampled them",
        ),
        (
            "mismatch/kept_kv_*",
            "",
            "",
            "the same statistics of responses that kept keys and values of older weights (`rollout.keep_kv`), which "
            "no other of these figures counts",
        ),
        ("mismatch/unaligned_*", "", "", "the same statistics with the plain model as learner, for comparison"),
        ("mismatch/probe_logp_abs_max", "nats", "min", "largest |d log p| on the probe after a publication"),
    ),
    "staleness": (
        ("staleness/age_*", "versions", "", "how much older than the learner the oldest tokens of a response are"),
        ("staleness/continued", "responses", "", "responses that went on under newer weights (`rollout.partial`)"),
        (
            "staleness/kept_kv",
            "responses",
            "",
            "responses that went on with keys and values of older weights (`rollout.keep_kv`)",
        ),
        ("staleness/segments", "segments", "", "parts of the step's responses that one version sampled each"),
        ("staleness/k1_kl", "nats", "", "KL(sampler || pi_prox), estimator k1"),
        ("staleness/k3_kl", "nats", "", "KL(sampler || pi_prox), estimator k3"),
        ("staleness/ess", "share", "", "effective sample size of the weights pi_prox / sampler"),
    ),
    "quant": (
        ("quant/codes_changed", "share", "", "low-bit codes that an update changed; an aligned learner logs it"),
        ("quant/update_below_grid", "share", "", "weights that an update moved by less than half a grid step"),
    ),
    "pool": (
        ("pool/size", "prompts", "", "prompts in the pool"),
        ("pool/cold", "prompts", "", "prompts that were not drawn yet"),
        ("pool/low", "prompts", "", "drawable prompts whose success rate is below the target"),
        ("pool/high", "prompts", "", "drawable prompts whose success rate is above the target"),
        ("pool/in_flight", "prompts", "", "prompts whose responses are not scored yet"),
        ("pool/cooling", "prompts", "", "prompts that rest after a draw"),
        ("pool/retired", "prompts", "", "prompts that are no longer drawn, as solved or hopeless"),
        ("pool/archived", "prompts", "", "prompts that the capacity moved out of the pool"),
        ("pool/estimated", "prompts", "", "prompts not drawn yet whose success rate is estimated"),
        ("pool/augmented_share", "share", "", "prompts in the pool that the policy wrote"),
        ("pool/success_mean", "share", "", "mean success rate of the prompts that were drawn"),
        ("pool/success_hist_*", "share", "", "drawn prompts by success rate, in ten bins"),
        ("pool/frontier_width", "", "", "width of the band of success rates that is drawn from"),
        ("pool/zero_variance_share", "share", "", "drawn groups whose rewards were all equal"),
        ("pool/estimate_error", "share", "", "mean error of the estimated success rates"),
        ("pool/unknown_results", "count", "", "results for prompts that the pool does not know"),
        ("pool/evicted", "prompts", "", "prompts that the capacity evicted"),
        ("pool/refused", "prompts", "", "new prompts that a full pool refused"),
        ("pool/reinserted", "prompts", "", "archived prompts that came back"),
        (
            "augment/*",
            "problems",
            "",
            "problems that the policy wrote since the start, by their fate",
        ),
        ("train/groups_sampled", "count", "", "groups that dynamic sampling sampled in a step"),
        ("train/stragglers", "count", "", "groups that took too long in a step, and were given back"),
        ("train/kept", "count", "", "groups that took too long in a step, and are left to a later one"),
        ("train/too_old", "count", "", "groups that were, or would be, too old to learn from, and were given back"),
        ("train/group_size_*", "responses", "", "smallest and largest group of a step"),
    ),
    "error tokens": (
        ("error_tokens/share", "share", "min", "tokens that a detector flags"),
        ("error_tokens/responses", "share", "min", "responses that have such a token"),
        ("error_tokens/repeated", "share", "", "tokens of often repeated n-grams"),
        ("error_tokens/compressible", "share", "", "tokens of responses that compress too well"),
        ("error_tokens/improbable", "share", "", "tokens in runs that the learner finds improbable"),
        ("error_tokens/q[1-4]", "share", "", "error tokens of the first to the last quarter of each response"),
        ("error_tokens/*", "share", "", "error tokens of responses of positive, zero or negative advantage"),
    ),
    "speed": (
        ("perf/tokens_per_s", "tokens/s", "max", "sampled tokens for each second of a whole step"),
        (
            "perf/sample_tokens_per_s",
            "tokens/s",
            "max",
            "sampled tokens for each second of sampling; only in turn with learning",
        ),
        ("perf/workers_idle", "share", "min", "time of a step in which a worker had no group, mean over workers"),
        ("perf/learner_idle", "share", "min", "time of a step in which the learner had no call"),
        ("timing_s/step", "s", "min", "seconds of a step"),
        ("timing_s/*", "s", "", "seconds of one phase of a step"),
        ("training/rollouts", "responses", "", "responses since the start of the run"),
    ),
    "memory": (
        ("memory/driver", "GiB", "", "resident memory of the driver"),
        ("memory/workers", "GiB", "", "resident memory of the rollout workers on the driver's machine"),
        ("memory/ranks", "GiB", "", "resident memory of the learner ranks on the driver's machine"),
        ("memory/others", "GiB", "", "resident memory of the driver's other processes: verifiers, Ray's own"),
        ("memory/gpu_peak", "GiB", "", "most memory that torch held on the GPU of a learner rank"),
    ),
    "system": (
        ("system/memory_free", "GiB", "", "memory that the driver's machine has left"),
        ("system/disk_free", "GiB", "", "disk that the run's folder has left"),
    ),
}


@dataclass(frozen=True)
class Described:
    """A metric of the table. `best` says which value of a run is its best one; "" where none is."""

    name: str
    section: str
    unit: str
    best: Best
    text: str


@cache
def describe(name: str) -> Described | None:
    """The row for the metric `name`: the first that matches; None when the table has none."""
    return next((row for row in rows() if fnmatchcase(name, row.name)), None)


def section_of(name: str) -> str:
    row = describe(name)
    return row.section if row else OTHER


def position(name: str) -> int:
    """The place of the metric's row in the table; of metrics that it does not have, the end."""
    found = list(rows())
    row = describe(name)
    return found.index(row) if row else len(found)


def overall_figures(names: Iterable[str]) -> list[str]:
    """Those metrics that are a figure of the policy over all held-out prompts of an evaluation."""
    return [name for name in names if name.startswith("eval/") and name.count("/") == 1 and name != HELD_OUT]


def rows() -> Iterator[Described]:
    for section, of_section in SECTIONS.items():
        yield from (Described(name, section, unit, best, text) for name, unit, best, text in of_section)


def page() -> str:
    """docs/metrics.md."""
    lines = ["# Metrics", "", "Made by `python -m launch.run.metric_table > docs/metrics.md`. `*` stands for any text."]
    for section, of_section in SECTIONS.items():
        lines += ["", f"## {section.capitalize()}", "", "| metric | unit | best | meaning |", "|---|---|---|---|"]
        cells = [(f"`{name}`", unit, best, text.replace("|", "&#124;")) for name, unit, best, text in of_section]
        lines += [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
